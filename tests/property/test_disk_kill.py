"""Kills a process with SIGKILL while it writes to a disk tier, and reads everything after each kill, again and again.

Runs 10 kills. TIDEGATE_TEST_KILLS=200 in the environment runs 200.
"""

import os
import random
import subprocess
import sys
from pathlib import Path

from engine.kvcache.disk.outcome import Outcome
from tests.support.disk_store import digest_of, family_of, open_store, payload_of, read, scanned

ROOT = Path(__file__).resolve().parents[2]
NUM_KILLS = int(os.environ.get("TIDEGATE_TEST_KILLS", "10"))
NUM_RECORDS = 40
NUM_BYTES = 300_000


def run_and_kill(folder, seed, num_lines):
    """Kill a writer some time after its line `num_lines`. Returns all its lines, as (word, number)."""
    command = [sys.executable, "-m", "tests.support.disk_writer", folder, str(seed), str(NUM_RECORDS), str(NUM_BYTES)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as writer:
        lines = [writer.stdout.readline() for _ in range(num_lines)]
        writer.kill()
        lines += writer.stdout.readlines()
    assert writer.returncode == -9, lines[-1:]
    return [(word, int(number)) for word, number in (line.split() for line in lines if line.endswith("\n"))]


def test_after_a_kill_at_any_moment_no_record_is_wrong_and_the_latest_are_there(tmp_path):
    rng = random.Random(7)
    numbers, num_read = set(), 0
    for kill in range(1, NUM_KILLS + 1):
        lines = run_and_kill(tmp_path / "kv", kill, rng.randrange(1, 150))
        written = [number for word, number in lines if word == "written"]
        families = {family_of(number) for word, number in lines if word == "forgotten"}
        forgotten = {number for number in numbers | set(written) if family_of(number) in families}
        numbers.update(written)
        store = scanned(open_store(tmp_path / "kv", NUM_RECORDS, NUM_BYTES))
        found = {
            number: read(store, digest_of(number)) for number in sorted(numbers) if store.find(digest_of(number)) is not None
        }
        right = {number for number, payload in found.items() if payload == payload_of(digest_of(number), NUM_BYTES)}
        assert all(found[number] is Outcome.CORRUPT for number in found.keys() - right)
        # Of 40 records, the latest 12 are not evicted: 8 are written at a time, and reads renew no others than the latest 20.
        latest = [number for number in written if number not in forgotten][-12:]
        assert set(latest) <= right
        assert not forgotten & found.keys()
        store.check()
        assert store.close()
        num_read += len(right)
        numbers &= right  # the others were evicted, and are never written again
    assert num_read > 10 * NUM_KILLS
