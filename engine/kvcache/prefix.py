"""PrefixIndex: finds the blocks on the device that already hold the KV of a prompt's beginning.

A full block is published under its digest (`identity.py`). Equal digests mean equal prefixes, so a digest that is found is a hit.

Requests that compute the same tokens side by side have the same content in different blocks. One block is the entry's
`block`; the others are its `copies`. An entry loses its content only when the last of these blocks is overwritten.

A block may lack the records of some kinds of pools (`kinds.py`). The entry's `block` is one that lacks least.

All entries that begin with the same first block are a family. If the content of a block may be wrong, then so may all that was
computed from it, and its family is withdrawn as a whole.
"""

from __future__ import annotations

from engine.errors import InternalError
from engine.kvcache.chain import Chain, Entry
from engine.kvcache.kinds import ALL


class PrefixIndex:
    __slots__ = ("_by_block", "_by_digest", "_partial")

    def __init__(self) -> None:
        self._by_digest: dict[bytes, Entry] = {}
        self._by_block: dict[int, Entry] = {}
        self._partial: dict[int, int] = {}  # masks of the published blocks that lack records of some kind

    def __len__(self) -> int:
        return len(self._by_digest)

    def __contains__(self, block: int) -> bool:
        return block in self._by_block

    def mask(self, block: int) -> int:
        """Return the mask of the kinds of pools whose records a published block holds."""
        return self._partial.get(block, ALL)

    def find(self, digest: bytes) -> Entry | None:
        return self._by_digest.get(digest)

    def match(self, chain: Chain, limit: int) -> int:
        """Bring `chain.matched` up to date, with at most `limit` entries. Returns the number of entries added.

        The method continues the match of the previous call, so its cost grows only with the entries added or removed since.
        Blocks are normally taken from the end of a prefix, so it looks only at the end for entries that are gone. `verify` looks
        at all.
        """
        matched = chain.matched
        while matched and not self._is_alive(matched[-1]):
            matched.pop()
        before = len(matched)
        for index in range(before, limit):
            digest = chain.digest(index)
            entry = None if digest is None else self.find(digest)
            if entry is None:
                break
            matched.append(entry)
        return len(matched) - before

    def verify(self, chain: Chain) -> int:
        """Shorten `chain.matched` to the entries before the first one that is gone. Returns how many are left."""
        matched = chain.matched
        alive = next((at for at, entry in enumerate(matched) if not self._is_alive(entry)), len(matched))
        del matched[alive:]
        return alive

    def publish(self, chain: Chain, blocks: list[int], num_full: int, inner: int = ALL, last: int = ALL) -> None:
        """Publish the chain's blocks up to `num_full` that are not published yet. `blocks` is the request's block table.

        The last of them has the mask `last`, and the others `inner`. A chain whose latest published block has been withdrawn
        publishes nothing more.
        """
        at = chain.num_published
        if at and blocks[at - 1] not in self._by_block:
            chain.closed = True
        if chain.closed:
            return
        if chain.digest(num_full - 1) is None:
            raise InternalError(f"block {blocks[num_full - 1]} is published before it is full")
        digests = chain.digests
        for index in range(at, num_full - 1):
            self.put(digests[index], digests[0], blocks[index], inner)
        self.put(digests[num_full - 1], digests[0], blocks[num_full - 1], last)
        chain.num_published = num_full

    def put(self, digest: bytes, family: bytes, block: int, mask: int = ALL) -> None:
        """Enter `block`, which is not published under another digest, as one that holds the content of `digest`."""
        entry = self._by_digest.get(digest)
        if block in self._by_block:
            if self._by_block[block] is entry:
                return
            self.forget(block)
        if entry is None:
            entry = self._by_digest[digest] = Entry(digest, family, block)
        elif self.mask(entry.block) & mask != mask:
            entry.block, entry.copies = block, (*entry.copies, entry.block)
        else:
            entry.copies += (block,)
        self._by_block[block] = entry
        if mask != ALL:
            self._partial[block] = mask

    def forget(self, block: int) -> Entry | None:
        """Remove a block from the prefix index, since it is about to be overwritten.

        If another block holds the same content, that block takes its place in the index. If none does, the entry is returned.
        """
        entry = self._by_block.pop(block, None)
        if entry is None:
            return None
        self._partial.pop(block, None)
        if block != entry.block:
            entry.copies = tuple(copy for copy in entry.copies if copy != block)
            return None
        if entry.copies:
            entry.block = max(entry.copies, key=self.mask) if self._partial else entry.copies[0]
            entry.copies = tuple(copy for copy in entry.copies if copy != entry.block)
            return None
        del self._by_digest[entry.digest]
        return entry

    def withdraw(self, family: bytes) -> None:
        """Remove all entries of a family, since their content may be wrong. The cost grows with the size of the index."""
        for entry in [entry for entry in self._by_digest.values() if entry.family == family]:
            for block in (entry.block, *entry.copies):
                del self._by_block[block]
                self._partial.pop(block, None)
            del self._by_digest[entry.digest]

    def clear(self) -> int:
        """Remove all entries. Returns how many there were."""
        num = len(self._by_digest)
        self._by_digest.clear()
        self._by_block.clear()
        self._partial.clear()
        return num

    def check(self) -> None:
        """Raise InternalError if the two maps disagree."""
        for block, entry in self._by_block.items():
            if block != entry.block and block not in entry.copies:
                raise InternalError(f"block {block} is listed under the entry of block {entry.block}")
        for digest, entry in self._by_digest.items():
            blocks = (entry.block, *entry.copies)
            if digest != entry.digest or any(self._by_block.get(block) is not entry for block in blocks):
                raise InternalError(f"the entry of block {entry.block} is listed under a wrong digest or block")
        if not self._partial.keys() <= self._by_block.keys():
            raise InternalError("a block that is not published has a mask")
        if len(self._by_block) != sum(1 + len(entry.copies) for entry in self._by_digest.values()):
            raise InternalError(f"{len(self._by_block)} blocks are published under {len(self._by_digest)} digests")

    def _is_alive(self, entry: Entry) -> bool:
        return self._by_digest.get(entry.digest) is entry
