"""PrefixIndex: finds the blocks that already hold the KV of a prompt's beginning.

A full block is published under a chained hash: the hash of its token ids and of the hash of the block before it. The salt
is the first input of the chain, so requests with different salts never share blocks.

    salt "a" -> H(salt) -> H(.. + tokens 0..63) -> H(.. + tokens 64..127) -> ...

A hash only finds candidates. An entry matches if its token ids are the same and its parent is the entry matched before it
(or the salt, for the first block). Requests whose hashes collide therefore never read each other's KV.

Requests that compute the same tokens side by side have the same content in different blocks. One block is the entry's
`block`; the others are its `copies`. An entry loses its content only when the last of these blocks is overwritten.

An entry outlives all entries that descend from it: a request that holds a block of an entry also holds a block of each
ancestor, and it releases the ancestors' blocks last. Only a withdrawal or a hash collision breaks this rule. Both advance
`epoch`, and a match remembered from an earlier epoch is void.
"""

from __future__ import annotations

from array import array

import msgspec
import xxhash

from engine.errors import InternalError

HASH_AHEAD = 16  # blocks hashed at a time: a prompt is hashed only as far as it is matched or computed


class Link(msgspec.Struct, frozen=True, gc=False):
    """Describes one full block of a request's tokens: its token ids, and the chained hash up to and including this block."""

    digest: bytes
    tokens: bytes


class Entry(msgspec.Struct, gc=False):
    """Describes the content of one published block.

    `number` is never reused, so an entry whose parent was removed cannot match under an entry published later.
    """

    number: int
    link: Link
    parent: int | str  # number of the entry of the preceding block; the salt for a first block
    block: int  # the block that a matching request shares
    copies: tuple[int, ...] = ()  # other blocks with the same content


class Chain:
    """Holds a request's full blocks as links, each with its hash, and how many of them are matched or published.

    Blocks are matched while the request waits, and published while it runs. `tokens` is the request's own array of token ids,
    which grows. A link is made when it is first needed.
    """

    __slots__ = ("closed", "epoch", "links", "matched", "num_published", "parent", "retry_at", "salt", "tokens")

    def __init__(self, salt: str, tokens: array[int]) -> None:
        self.salt = salt
        self.tokens = tokens
        self.links: list[Link] = []
        self.matched: list[Entry] = []  # entries that the first blocks matched, valid while the index is at `epoch`
        self.epoch = 0
        self.retry_at = 0  # the request cannot fit until BlockPool.num_released has reached this
        self.num_published = 0
        self.parent: Entry | None = None  # entry of the last published block
        self.closed = False  # nothing more may be published: blocks were withdrawn

    def link(self, index: int, block_size: int) -> Link | None:
        """Return the link of block `index`, or None if the tokens do not fill that block."""
        if index >= len(self.links):
            num_full = len(self.tokens) // block_size
            if index >= num_full:
                return None
            self._lengthen(min(index + HASH_AHEAD, num_full), block_size)
        return self.links[index]

    def _lengthen(self, num_blocks: int, block_size: int) -> None:
        links = self.links
        data = self.tokens[len(links) * block_size : num_blocks * block_size].tobytes()
        digest = links[-1].digest if links else xxhash.xxh3_128_digest(self.salt.encode())
        size = block_size * self.tokens.itemsize
        for at in range(0, len(data), size):
            part = data[at : at + size]
            digest = xxhash.xxh3_128_digest(digest + part)
            links.append(Link(digest, part))


class PrefixIndex:
    __slots__ = ("_block_size", "_by_block", "_by_digest", "_number", "epoch")

    def __init__(self, block_size: int) -> None:
        self.epoch = 0
        self._block_size = block_size
        self._by_digest: dict[bytes, Entry] = {}
        self._by_block: dict[int, Entry] = {}
        self._number = 0

    def __len__(self) -> int:
        return len(self._by_digest)

    def __contains__(self, block: int) -> bool:
        return block in self._by_block

    def match(self, chain: Chain, limit: int) -> int:
        """Bring `chain.matched` up to date, with at most `limit` entries. Returns the number of entries added.

        The method continues the match of the previous call, so its cost grows only with the entries added or removed since.
        """
        matched = chain.matched
        if chain.epoch != self.epoch:
            chain.epoch = self.epoch
            matched.clear()
        while matched and not self._is_alive(matched[-1]):
            matched.pop()
        before = len(matched)
        parent = matched[-1] if matched else None
        for index in range(before, limit):
            link = chain.link(index, self._block_size)
            parent = None if link is None else self._find(link, _number(parent, chain))
            if parent is None:
                break
            matched.append(parent)
        return len(matched) - before

    def publish(self, chain: Chain, blocks: list[int], num_full: int) -> None:
        """Publish the chain's links up to block `num_full` that are not published yet. `blocks` is the request's block table."""
        if chain.parent is not None and not self._is_alive(chain.parent):
            chain.closed = True
        while chain.num_published < num_full and not chain.closed:
            block, link = blocks[chain.num_published], chain.link(chain.num_published, self._block_size)
            if link is None:
                raise InternalError(f"block {block} is published before it is full")
            parent = _number(chain.parent, chain)
            entry = self._find(link, parent)
            if entry is None:
                entry = self._put(block, parent, link)
            elif self._by_block.get(block) is not entry:
                self.forget(block)
                entry.copies += (block,)
                self._by_block[block] = entry
            chain.parent = entry
            chain.num_published += 1

    def forget(self, block: int) -> None:
        """Remove a block from the prefix index, since it is about to be overwritten.

        If another block holds the same content, that block takes its place in the index.
        """
        entry = self._by_block.pop(block, None)
        if entry is None:
            return
        if block != entry.block:
            entry.copies = tuple(copy for copy in entry.copies if copy != block)
        elif entry.copies:
            entry.block, *others = entry.copies
            entry.copies = tuple(others)
        else:
            del self._by_digest[entry.link.digest]

    def withdraw(self, blocks: list[int]) -> None:
        """Remove the entries of blocks whose content may be wrong. Entries that descend from them can no longer be matched.

        Other blocks of these entries are removed too. If an entry lived on by them, it could be evicted before entries that
        descend from it: their holders may hold only the blocks that were withdrawn.
        """
        for block in blocks:
            entry = self._by_block.get(block)
            if entry is not None:
                for copy in (entry.block, *entry.copies):
                    del self._by_block[copy]
                del self._by_digest[entry.link.digest]
        self.epoch += 1

    def check(self) -> None:
        """Raise InternalError if the two maps disagree, or if an entry has outlived its parent."""
        for block, entry in self._by_block.items():
            if block != entry.block and block not in entry.copies:
                raise InternalError(f"block {block} is listed under the entry of block {entry.block}")
        for digest, entry in self._by_digest.items():
            blocks = (entry.block, *entry.copies)
            if digest != entry.link.digest or any(self._by_block.get(block) is not entry for block in blocks):
                raise InternalError(f"the entry of block {entry.block} is listed under a wrong hash or block")
        if len(self._by_block) != sum(1 + len(entry.copies) for entry in self._by_digest.values()):
            raise InternalError(f"{len(self._by_block)} blocks are published under {len(self._by_digest)} hashes")
        numbers = {entry.number for entry in self._by_digest.values()}
        if not self.epoch and any(isinstance(e.parent, int) and e.parent not in numbers for e in self._by_digest.values()):
            raise InternalError("an entry has outlived its parent")

    def _find(self, link: Link, parent: int | str) -> Entry | None:
        entry = self._by_digest.get(link.digest)
        if entry is None or entry.parent != parent or entry.link.tokens != link.tokens:
            return None
        return entry

    def _is_alive(self, entry: Entry) -> bool:
        return self._by_digest.get(entry.link.digest) is entry

    def _put(self, block: int, parent: int | str, link: Link) -> Entry:
        stale = self._by_digest.pop(link.digest, None)
        if stale is not None:  # its hash collides, or one of its ancestors was withdrawn
            for other in (stale.block, *stale.copies):
                del self._by_block[other]
            self.epoch += 1
        self.forget(block)
        self._number += 1
        entry = Entry(self._number, link, parent, block)
        self._by_digest[link.digest] = self._by_block[block] = entry
        return entry


def _number(parent: Entry | None, chain: Chain) -> int | str:
    return chain.salt if parent is None else parent.number
