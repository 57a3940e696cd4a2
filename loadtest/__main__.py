"""Runs the load test, `python -m loadtest run URL ...` or `compare A B ...`. docs/loadtest.md explains both."""

from loadtest.cli import app

if __name__ == "__main__":
    app(prog_name="python -m loadtest")
