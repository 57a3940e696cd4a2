"""BlockIdentity: the digest under which a full block of KV is found, in this engine's memory or outside of it.

    root digest  =  H(facts, salt)                     facts: the model's fingerprint, the format of the KV, the block size
    digest 0     =  H(root digest, tokens of block 0)
    digest i     =  H(digest i - 1, tokens of block i)

H is BLAKE2b with a secret key. Whoever does not know the key cannot make two prefixes with one digest, so equal digests mean
equal prefixes, and nothing else is compared. A digest does not depend on where a block lies or when it was computed: a block that
leaves the cache and comes back is found again, and so is all that follows it.
"""

from __future__ import annotations

import hashlib
import secrets

import msgspec

from engine.plan import KVFormat

DIGEST_BYTES = 16
KEY_BYTES = 32


def identity_of(kv: KVFormat, block_size: int, key: bytes | None = None) -> BlockIdentity:
    """Return the identity of the blocks of a model. See BlockIdentity for `key`."""
    return BlockIdentity(block_size, kv.model, kv.pools, str(kv.kinds), key=key)


class BlockIdentity:
    """Computes the digests of blocks. Two engines with the same key, facts and block size give equal prefixes equal digests.

    `key` is by default random, so that nobody outside this process can compute a digest. `facts` are all that decides on the
    content of a block besides its tokens.
    """

    __slots__ = ("_block", "_facts", "_root", "block_size")

    def __init__(self, block_size: int, *facts: str, key: bytes | None = None) -> None:
        key = key or secrets.token_bytes(KEY_BYTES)
        self.block_size = block_size
        self._facts = facts
        # `person` separates the two uses of the key: no salt can be chosen such that its root digest is that of a block.
        self._root = hashlib.blake2b(digest_size=DIGEST_BYTES, key=key, person=b"root")
        self._block = hashlib.blake2b(b"\0", digest_size=DIGEST_BYTES, key=key, person=b"block")  # has taken in the key's block

    def root(self, salt: str) -> bytes:
        """Return the digest that stands before the first block of every prompt with this salt."""
        state = self._root.copy()
        state.update(msgspec.json.encode((self._facts, self.block_size, salt)))
        return state.digest()

    @property
    def facts(self) -> bytes:
        """All that decides on the content of a block besides its tokens and the salt, in one string of bytes."""
        return msgspec.json.encode((self._facts, self.block_size))

    def extend(self, digests: list[bytes], before: bytes, data: bytes, size: int) -> None:
        """Append the digests of the blocks in `data`, the packed tokens of `size` bytes a block that follow digest `before`."""
        begin = self._block.copy
        for at in range(0, len(data), size):
            state = begin()
            state.update(before + data[at : at + size])
            before = state.digest()
            digests.append(before)
