"""Starts the `tidegate` command. This module imports nothing slow, so that Ctrl-C during other imports ends without a
traceback."""

import sys


def main() -> None:
    try:
        from server.cli import main as run

        run()
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
