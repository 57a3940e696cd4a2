"""Runs the load test, `python -m loadtest run URL ...` or `compare A B ...`. docs/loadtest.md explains both."""

import importlib
import importlib.util
import sys

NEEDED = ("httptools", "matplotlib", "uvloop")  # the extra `loadtest`; a server does without them


def missing() -> str | None:
    """Return what to do if a package of the extra is not installed, or None if all are."""
    absent = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if not absent:
        return None
    names = ", ".join(absent)
    return f"error: the load test needs {names}, not installed here: run {sys.executable} -m pip install -e '.[loadtest]'"


if __name__ == "__main__":
    remedy = missing()
    if remedy is not None:
        print(remedy, file=sys.stderr)
        sys.exit(2)
    importlib.import_module("loadtest.cli").app(prog_name="python -m loadtest")
