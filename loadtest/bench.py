"""Runs the benchmarks of `make bench` one after the other, each in a process of its own, and keeps their result lines.

    make bench                       all of them
    make bench ARGS="scheduler api"  some
    make bench ARGS="--record"       also append each line to loadtest/results/NAME.jsonl

Each benchmark is a module here whose `main` prints a table for people and, as its last line, one JSON object.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "loadtest" / "results"
BENCHMARKS = {
    "scheduler": "schedule + commit at 256 running requests, microseconds a step",
    "api": "an API worker's CPU per streamed token, 256 streams on FakeRunner",
    "disk": "writes and verified reads of the disk tier in build/, GB/s by record size and threads",
    "tiers": "time to first token of 3,500 tokens from the host tier, beside computing them, with Tidepool",
    "cpu": "tokens/s on this CPU beside transformers.generate, 0.1B parameters, float32",
}


def commit() -> str:
    """Return the short id of the checked-out commit, followed by + if the working tree has changes."""
    git = ["git", "-C", str(ROOT)]
    head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    dirty = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True).stdout.strip()
    return head + ("+" if dirty else "")


def run(name: str) -> dict[str, object]:
    """Run one benchmark, show its output, and return its result line. Raises CalledProcessError if the benchmark fails."""
    command = [sys.executable, "-m", f"loadtest.bench_{name}"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    last = ""
    for line in process.stdout:
        print(line, end="", flush=True)
        last = line if line.strip() else last
    if process.wait() != 0:
        raise subprocess.CalledProcessError(process.returncode, command)
    result: dict[str, object] = json.loads(last)
    return {"date": datetime.date.today().isoformat(), "commit": commit(), **result, "command": f"make bench ARGS={name}"}


def main() -> None:
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"which: {', '.join(BENCHMARKS)} (default: all)")
    parser.add_argument("--record", action="store_true", help="append the result lines to loadtest/results/")
    options = parser.parse_args()
    unknown = set(options.names) - set(BENCHMARKS)
    if unknown:
        parser.error(f"no benchmark named {', '.join(sorted(unknown))}; there are: {', '.join(BENCHMARKS)}")
    for name in options.names or BENCHMARKS:
        print(f"== {name}: {BENCHMARKS[name]}", flush=True)
        result = run(name)
        if options.record:
            with (RESULTS / f"{name}.jsonl").open("a") as file:
                file.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
