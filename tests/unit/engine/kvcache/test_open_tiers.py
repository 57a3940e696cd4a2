"""Tests of open_tiers: which key digests have, and which folders, caps and keys are refused."""

import pytest

from engine.config import CacheConfig, EngineConfig, FakeConfig, ModelLimits
from engine.errors import ConfigError, InternalError
from engine.fake import build_fake
from engine.kvcache.open_tiers import open_tiers
from tests.support.clock import Clock
from tests.support.disk_store import STUCK

LIMITS = ModelLimits(max_model_len=64, vocab_size=50, eos_token_ids=(3,), dtype="float32")
KEY = bytes(range(32))


def built(folder=None, *, disk_bytes=1 << 20, block_size=4, **cache):
    if folder is not None:
        cache |= {"disk_tier_folder": str(folder), "disk_tier_bytes": disk_bytes, "host_tier_bytes": 1 << 22}
    cache = CacheConfig(block_size=block_size, num_blocks=16, **cache)
    return build_fake(EngineConfig(model="m", runner="fake", cache=cache, fake=FakeConfig(block_bytes=4096)), LIMITS)


@pytest.fixture
def digest_in():
    """Return a function that opens tiers and returns the digest of a block. The tiers are closed after each call."""

    def open_one(*args, **cache):
        tiers = open_tiers(built(*args, **cache), Clock())
        digests = []
        tiers.identity.extend(digests, tiers.identity.root(""), b"tokens", 6)
        if tiers.disk is not None:
            tiers.disk.close(STUCK)
        return digests[0]

    return open_one


def test_without_a_folder_there_is_no_disk_tier_and_no_two_engines_share_a_key(digest_in):
    assert open_tiers(built(), Clock()).disk is None
    assert digest_in() != digest_in()


def test_engines_over_one_folder_have_one_key(digest_in, tmp_path):
    assert digest_in(tmp_path / "kv") == digest_in(tmp_path / "kv") != digest_in(tmp_path / "other")


def test_blocks_of_another_size_have_other_digests(digest_in, tmp_path):
    assert digest_in(tmp_path / "kv") != digest_in(tmp_path / "kv", block_size=8)


def test_replicas_share_the_key_of_a_file(digest_in, tmp_path):
    (tmp_path / "key").write_bytes(KEY)
    one, two = (digest_in(tmp_path / name, disk_tier_key_file=str(tmp_path / "key")) for name in ("a", "b"))
    assert one == two
    assert not (tmp_path / "a" / "key").exists()


def test_the_cap_on_writes_reaches_the_store(tmp_path):
    tiers = open_tiers(built(tmp_path / "kv", disk_tier_write_rate=1e6), Clock())
    assert tiers.disk.store._bucket._rate == 1e6
    tiers.disk.close(STUCK)


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "cannot be read: No such file or directory$"), (b"short", "has 5 bytes: a key has 32 random bytes, as `head -c 32 ")],
)
def test_a_key_file_that_holds_no_key_is_refused(tmp_path, content, message):
    if content is not None:
        (tmp_path / "key").write_bytes(content)
    with pytest.raises(ConfigError, match=rf"^cache\.disk_tier_key_file is {tmp_path}/key, which {message}") as error:
        open_tiers(built(tmp_path / "kv", disk_tier_key_file=str(tmp_path / "key")), Clock())
    assert error.value.param == "cache.disk_tier_key_file"


def test_a_folder_in_use_is_refused(tmp_path):
    tiers = open_tiers(built(tmp_path / "kv"), Clock())
    with pytest.raises(ConfigError, match="is in use by another process") as error:
        open_tiers(built(tmp_path / "kv"), Clock())
    assert error.value.param == "cache.disk_tier_folder"
    tiers.disk.close(STUCK)


def test_a_cap_below_one_record_is_refused_and_the_folder_is_free_again(tmp_path):
    with pytest.raises(ConfigError, match=r"^cache\.disk_tier_bytes is 4096, and a file of one record takes") as error:
        open_tiers(built(tmp_path / "kv", disk_bytes=4096), Clock())
    assert error.value.param == "cache.disk_tier_bytes"
    open_tiers(built(tmp_path / "kv"), Clock()).disk.close(STUCK)


def test_a_runner_without_a_host_tier_cannot_have_a_disk_tier(tmp_path):
    runner = built(tmp_path / "kv")._replace(host=None)
    with pytest.raises(InternalError, match="no host tier"):
        open_tiers(runner, Clock())
