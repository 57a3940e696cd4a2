"""Measures the disk tier: GB/s of writes and of verified reads, by record size, threads and kind of I/O.

    python -m loadtest.bench_disk [--folder build/bench-disk] [--megabytes 256] [--rounds 3]

Records of 8 MiB are blocks of 64 tokens of an 8B Llama in bfloat16. Each cell fills a new store and reads all of it in random
order, through the store's own threads; a figure is the median of the rounds. A write ends on the disk: the time includes the
sync of the files. Before the reads, the files are removed from the page cache. Then it measures how many headers a second a start
finds, and how fast a payload is summed. Prints a table, and one JSON line with all cells.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from engine.kvcache.disk.rates import AHEAD, make_digests, measure, move, open_store, random_buffer, sync
from engine.kvcache.disk.records import RecordFormat
from loadtest.bench import commit

SIZES = (8 << 20, 2 << 20, 256 << 10)  # bytes of a record
THREADS = (1, 4, 8)


def main() -> None:
    parser = argparse.ArgumentParser(description="GB/s of the disk tier.")
    parser.add_argument(
        "--folder", type=Path, default=Path("build/bench-disk"), help="a folder on the disk to measure; it is deleted"
    )
    parser.add_argument("--megabytes", type=int, default=256, help="what each cell writes and reads")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    began = time.perf_counter()
    cells = []
    print(f"{args.folder} ({_file_system(args.folder)}), {args.megabytes} MB a cell, median of {args.rounds} rounds; GB/s")
    print(f"{'record':>10}{'threads':>9}{'I/O':>8}{'write':>8}{'read':>8}   {'write':>8}{'read':>8}  ms a record")
    for size in SIZES:
        for direct in (True, False):
            for threads in THREADS:
                rounds = [_cell(args.folder, size, threads, direct, args.megabytes * 10**6) for _ in range(args.rounds)]
                cell = _middle(size, threads, rounds)
                cells.append(cell)
                print(
                    f"{size >> 10:6} KiB{threads:9}{cell['io']:>8}{cell['write_gb_s']:8.2f}{cell['read_gb_s']:8.2f}   "
                    f"{cell['write_ms']:8.2f}{cell['read_ms']:8.2f}",
                    flush=True,
                )
    extra = {"scan_headers_s": _scan(args.folder), **_checksums()}
    print(", ".join(f"{name} {figure:,}" for name, figure in extra.items()))
    print(json.dumps(_line(args, cells, time.perf_counter() - began) | extra))


def _cell(folder: Path, size: int, threads: int, direct: bool, total: int) -> dict[str, float | str]:
    """Write and read `total` bytes of records. Returns GB/s, and milliseconds that a record takes in its thread."""
    number = max(total // size, 2 * AHEAD * threads)
    shutil.rmtree(folder, ignore_errors=True)
    rates = measure(folder, size, number, num_threads=threads, direct=direct)
    shutil.rmtree(folder)
    found: dict[str, float | str] = {
        "io": "direct" if rates.is_direct else "plain",
        "write_gb_s": rates.write_gb_s,
        "read_gb_s": rates.read_gb_s,
    }
    return {**found, **{f"{kind}_ms": 1e3 * seconds for kind, seconds in rates.seconds.items()}}


def _scan(folder: Path) -> int:
    """Return how many headers a second a start finds, of 20,000 records that are not in the page cache."""
    size, number = 4096, 20_000
    store = open_store(folder, size, number)
    move(store, make_digests(number), [random_buffer(size) for _ in range(32)], is_read=False)
    store.close()
    sync(folder)
    began = time.perf_counter()
    store = open_store(folder, size, number)
    seconds = time.perf_counter() - began
    if len(store.index) != number:
        raise SystemExit("the scan did not find all records: the benchmark is wrong")
    store.close()
    shutil.rmtree(folder)
    return round(number / seconds)


def _checksums() -> dict[str, float]:
    """Return GB/s at which one thread sums a payload as records do, and as a keyed BLAKE2b of all of it would."""
    payload = random_buffer(SIZES[0])
    form = RecordFormat(len(payload), b"", bytes(32))
    sums: dict[str, Callable[[], object]] = {
        "sum_gb_s": lambda: form.encode(bytes(16), bytes(16), 1, payload),
        "blake2b_gb_s": lambda: hashlib.blake2b(payload, key=bytes(32), digest_size=16).digest(),
    }
    return {name: round(len(payload) / min(_seconds(run) for _ in range(9)) / 1e9, 2) for name, run in sums.items()}


def _seconds(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def _middle(size: int, threads: int, rounds: list[dict[str, float | str]]) -> dict[str, int | float | str]:
    figures = ("write_gb_s", "read_gb_s", "write_ms", "read_ms")
    medians = {name: round(statistics.median(float(one[name]) for one in rounds), 3) for name in figures}
    return {"bytes": size, "threads": threads, "io": rounds[0]["io"], **medians}


def _file_system(folder: Path) -> str:
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    done = subprocess.run(["stat", "-f", "-c", "%T", str(existing)], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def _line(args: argparse.Namespace, cells: list[dict[str, int | float | str]], seconds: float) -> dict[str, object]:
    best = max(cells, key=lambda cell: float(cell["read_gb_s"]))
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "device": f"{os.uname().machine}, {os.cpu_count()} CPUs, {_file_system(args.folder)}",
        "engine": "tidegate",
        "workload": f"disk tier, {args.megabytes} MB written and read a cell",
        "seconds": round(seconds, 1),
        "read_gb_s": best["read_gb_s"],
        "write_gb_s": max(cell["write_gb_s"] for cell in cells),
        "load_average": round(os.getloadavg()[0], 2),
        "cells": cells,
        "command": " ".join(["python -m loadtest.bench_disk", *sys.argv[1:]]),
    }


if __name__ == "__main__":
    main()
