"""The `tidegate` command: imports nothing slow itself, so that Ctrl-C while the rest is imported ends without a traceback."""

import sys


def main() -> None:
    try:
        from server.cli import main as run

        run()
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
