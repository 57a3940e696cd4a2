"""Tests how fast records may be written."""

from engine.kvcache.disk.write_policy import TokenBucket


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
