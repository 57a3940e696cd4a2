"""Chain: the digests of a request's blocks. Entry: the content of a published block, which chains are matched with."""

from __future__ import annotations

from array import array

import msgspec

from engine.kvcache.identity import BlockIdentity

HASH_AHEAD = 16  # blocks hashed at a time: a prompt is hashed only as far as it is matched or computed


class Entry(msgspec.Struct, gc=False):
    """Describes the content of one published block."""

    digest: bytes
    family: bytes  # digest of the first block of the prefix
    block: int  # the block that a matching request shares
    copies: tuple[int, ...] = ()  # other blocks with the same content


class Chain:
    """Holds the digests of a request's full blocks, and how many of the blocks are matched or published.

    Blocks are matched while the request waits, and published while it runs. `tokens` is the request's own array of token ids,
    which grows. A digest is computed when it is first needed.
    """

    __slots__ = ("_identity", "closed", "digests", "matched", "num_published", "num_usable", "retry_at", "salt", "tokens")

    def __init__(self, identity: BlockIdentity, salt: str, tokens: array[int]) -> None:
        self._identity = identity
        self.salt = salt
        self.tokens = tokens
        self.digests: list[bytes] = []
        self.matched: list[Entry] = []  # entries of the first blocks, as far as they were found
        self.num_usable = 0  # blocks of `matched` that can be used, as of the latest match
        self.retry_at = 0  # the request cannot fit until BlockPool.num_released has reached this
        self.num_published = 0
        self.closed = False  # nothing more may be published: blocks were withdrawn, or the cache was reset

    def digest(self, index: int) -> bytes | None:
        """Return the digest of block `index`, or None if the tokens do not fill that block."""
        digests = self.digests
        if index >= len(digests):
            size, tokens = self._identity.block_size, self.tokens
            num_full = len(tokens) // size
            if index >= num_full:
                return None
            data = tokens[len(digests) * size : min(index + HASH_AHEAD, num_full) * size].tobytes()
            before = digests[-1] if digests else self._identity.root(self.salt)
            self._identity.extend(digests, before, data, size * tokens.itemsize)
        return digests[index]
