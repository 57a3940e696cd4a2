"""PrefixIndex: finds the blocks that already hold the KV of a prompt's beginning.

A full block is filed under a chained hash: of its token ids and of the hash of the block before it; the first link of
the chain is the salt.

    salt "a" -> H(salt) -> H(.. + tokens 0..63) -> H(.. + tokens 64..127) -> ...

A hash only finds candidates. A hit counts once the token ids are the same and the entry hangs from the very entry that
was matched before it (or from this salt), so requests whose hashes collide never read each other's KV.
"""

from __future__ import annotations

from array import array
from typing import NamedTuple

import xxhash

from engine.errors import InternalError


class Link(NamedTuple):
    """One full block of a request's tokens: the chain's hash up to it, and its own token ids."""

    digest: bytes
    tokens: bytes


class Chain:
    """A request's full blocks as links, and how far they are filed. `parent` is what the next link hangs from."""

    __slots__ = ("links", "num_published", "parent", "salt")

    def __init__(self, salt: str) -> None:
        self.salt = salt
        self.links: list[Link] = []
        self.num_published = 0
        self.parent: int | str = salt

    def lengthen(self, tokens: array[int], block_size: int, num_blocks: int) -> None:
        """Have the links of the first `num_blocks` blocks of `tokens`."""
        links = self.links
        if len(links) >= num_blocks:
            return
        first = len(links) * block_size
        data = tokens[first : num_blocks * block_size].tobytes()
        digest = links[-1].digest if links else xxhash.xxh3_128_digest(self.salt.encode())
        size = len(data) // (num_blocks - len(links))
        for at in range(0, len(data), size):
            part = data[at : at + size]
            digest = xxhash.xxh3_128_digest(digest + part)
            links.append(Link(digest, part))


class _Entry(NamedTuple):
    number: int  # never used twice, so that a child of an entry long gone is not taken for a child of its successor
    block: int
    parent: int | str
    link: Link


class PrefixIndex:
    __slots__ = ("_by_block", "_by_digest", "_number")

    def __init__(self) -> None:
        self._by_digest: dict[bytes, _Entry] = {}
        self._by_block: dict[int, _Entry] = {}
        self._number = 0

    def __len__(self) -> int:
        return len(self._by_block)

    def __contains__(self, block: int) -> bool:
        return block in self._by_block

    def match(self, chain: Chain, limit: int) -> tuple[list[int], int | str]:
        """Return the blocks that hold the first links of `chain`, `limit` at most, and the parent of the link after them."""
        blocks: list[int] = []
        parent: int | str = chain.salt
        for link in chain.links[:limit]:
            entry = self._by_digest.get(link.digest)
            if entry is None or entry.parent != parent or entry.link.tokens != link.tokens:
                break
            blocks.append(entry.block)
            parent = entry.number
        return blocks, parent

    def publish(self, chain: Chain, blocks: list[int]) -> None:
        """File those of the chain's links that are not filed yet; `blocks` is the table that holds them."""
        for link, block in zip(chain.links[chain.num_published :], blocks[chain.num_published :], strict=False):
            entry = self._by_digest.get(link.digest)
            if entry is None or entry.parent != chain.parent or entry.link.tokens != link.tokens:
                entry = self._put(block, chain.parent, link)
            chain.parent = entry.number
            chain.num_published += 1

    def forget(self, block: int) -> None:
        """The block is about to be overwritten."""
        entry = self._by_block.pop(block, None)
        if entry is not None:
            del self._by_digest[entry.link.digest]

    def check(self) -> None:
        if len(self._by_block) != len(self._by_digest):
            raise InternalError(f"{len(self._by_block)} blocks filed under {len(self._by_digest)} hashes")
        for block, entry in self._by_block.items():
            if entry.block != block or self._by_digest.get(entry.link.digest) is not entry:
                raise InternalError(f"block {block} is filed as {entry.block}")

    def _put(self, block: int, parent: int | str, link: Link) -> _Entry:
        # An entry in the way either collides or hangs from an entry that is gone: it can never be matched from here.
        stale = self._by_digest.get(link.digest)
        if stale is not None:
            self.forget(stale.block)
        self.forget(block)
        self._number += 1
        entry = _Entry(self._number, block, parent, link)
        self._by_digest[link.digest] = self._by_block[block] = entry
        return entry
