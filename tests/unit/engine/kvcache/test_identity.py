"""Tests of BlockIdentity: what a digest depends on, and what it does not depend on."""

import subprocess
import sys

import pytest

from engine.kvcache.identity import DIGEST_BYTES, BlockIdentity

KEY = b"a key of these tests"
DATA = bytes(range(64))


def digests(identity: BlockIdentity, data: bytes = DATA, salt: str = "") -> list[bytes]:
    found: list[bytes] = []
    identity.extend(found, identity.root(salt), data, 16)
    return found


@pytest.mark.parametrize(
    ("identity", "data", "salt"),
    [
        pytest.param(BlockIdentity(4, "model", "pools", key=KEY), DATA, "salt", id="salt"),
        pytest.param(BlockIdentity(4, "other", "pools", key=KEY), DATA, "", id="model"),
        pytest.param(BlockIdentity(4, "model", "other", key=KEY), DATA, "", id="pools"),
        pytest.param(BlockIdentity(4, "modelpools", "", key=KEY), DATA, "", id="where a fact ends"),
        pytest.param(BlockIdentity(8, "model", "pools", key=KEY), DATA, "", id="block size"),
        pytest.param(BlockIdentity(4, "model", "pools", key=b"other"), DATA, "", id="key"),
        pytest.param(BlockIdentity(4, "model", "pools"), DATA, "", id="random key"),
        pytest.param(BlockIdentity(4, "model", "pools", key=KEY), bytes([9]) + DATA[1:], "", id="first token"),
    ],
)
def test_everything_that_decides_on_a_blocks_content_changes_all_digests(identity, data, salt):
    one = digests(BlockIdentity(4, "model", "pools", key=KEY))
    assert len(set(one)) == 4
    assert {len(digest) for digest in one} == {DIGEST_BYTES}
    assert not set(one) & set(digests(identity, data, salt))


def test_a_token_changes_the_digests_from_its_own_block_on():
    identity = BlockIdentity(4, key=KEY)
    one, other = digests(identity), digests(identity, DATA[:40] + b"x" + DATA[41:])
    assert [a == b for a, b in zip(one, other, strict=True)] == [True, True, False, False]


def test_the_salt_of_a_client_cannot_imitate_the_beginning_of_another_prompt():
    """The root digest of a salt and the digest of a block never agree, whatever bytes the salt has."""
    identity = BlockIdentity(4, key=KEY)
    found: list[bytes] = []
    identity.extend(found, b"", b'[[],4,"x"]', 16)
    assert found != [identity.root("x")]


def test_two_processes_with_one_key_give_a_prompt_the_same_digests():
    """Caches outside the engine store blocks under these digests, so the digests must not depend on the process."""
    script = f"""
from array import array
from engine.kvcache.chain import Chain
from engine.kvcache.identity import BlockIdentity
chain = Chain(BlockIdentity(64, "model", key={KEY!r}), "salt", array("i", range(1000)))
print([chain.digest(i).hex() for i in range(15)])
"""
    seeds = ("1", "2")
    printed = [
        subprocess.run([sys.executable, "-c", script], env={"PYTHONHASHSEED": seed}, capture_output=True, check=True).stdout
        for seed in seeds
    ]
    assert printed[0] == printed[1]
    assert len(printed[0]) > 15 * 32
