"""Tests which blocks are written, and how fast."""

from engine.kvcache.disk.write_policy import TokenBucket, WriteFilter
from tests.support.disk_store import digest_of


def test_a_block_passes_from_its_second_use_on():
    writes = WriteFilter(10)
    assert not writes.passes(digest_of(1))
    writes.use(digest_of(1))
    assert not writes.passes(digest_of(1))
    writes.use(digest_of(1))
    assert writes.passes(digest_of(1))
    assert not writes.passes(digest_of(2))


def test_the_blocks_of_a_finished_turn_pass_at_once():
    writes = WriteFilter(10)
    writes.finish([digest_of(1), digest_of(2)])
    writes.use(digest_of(2))
    assert writes.passes(digest_of(1))
    assert writes.passes(digest_of(2))


def test_the_filter_remembers_the_latest_digests_only():
    writes = WriteFilter(3)
    for number in range(4):
        writes.finish([digest_of(number)])
    assert [writes.passes(digest_of(number)) for number in range(4)] == [False, True, True, True]


def test_a_bucket_gives_out_its_rate_and_one_burst():
    now = 0.0
    bucket = TokenBucket(128.0, 50.0, lambda: now)
    given = 0
    for step in range(1281):
        now = step / 128
        while bucket.has(10):
            bucket.take(10)
            given += 10
    assert given == 50 + 10 * 128
    now = 1e6
    assert bucket.has(50)
    assert not bucket.has(51)
