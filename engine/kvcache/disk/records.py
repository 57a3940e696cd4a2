"""RecordFormat: how the bytes of one KV block lie in a slot of a segment file, and how a reader knows that they are right.

    slot     | header: one page | payload, filled up to whole pages |
    header   magic, version, payload bytes, stamp, format, digest, family, sum, seal; the rest of the page means nothing

The sum is XXH3 (128 bits) of the payload, with a seed that comes from the key. The seal is a keyed BLAKE2b of all fields before
it. A record is right only if both fit, so a write that was cut off at any byte leaves the old record, the new one, or one that
is recognised as neither. No order of writes and no fsync is needed for that.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass

import xxhash

from engine.errors import ConfigError
from engine.kvcache.disk.outcome import Outcome

PAGE = 4096  # bytes; unit of offsets, lengths and addresses in direct I/O
KEY_BYTES = 32
DIGEST_BYTES = 16
VERSION = 1
MAX_PAYLOAD = 1 << 30  # bytes; one call of preadv moves at most 2 GiB

_MAGIC = b"TIDEKV\r\n"
_FIELDS = struct.Struct("<8sIIQQ16s16s16s16s")
_SEAL_BYTES = 16
HEADER_BYTES = _FIELDS.size + _SEAL_BYTES


@dataclass(frozen=True, slots=True)
class Header:
    """The fields of a header whose seal is right. `stamp` grows with each write to the folder.

    `family` is the digest of the first block of the prefix that the record's block belongs to.
    """

    digest: bytes
    family: bytes
    stamp: int
    sum: bytes


class RecordFormat:
    """Encodes and checks records of `payload_bytes` each. Safe in several threads, since nothing changes after construction.

    `fingerprint` stands for everything that decides what the payload means: model, KV format, block size. Records that were
    written with another fingerprint or another key are FOREIGN.
    """

    def __init__(self, payload_bytes: int, fingerprint: bytes, key: bytes) -> None:
        """Raises ConfigError if the size or the key cannot be used."""
        if not 1 <= payload_bytes <= MAX_PAYLOAD:
            raise ConfigError(f"a record on disk has 1 to {MAX_PAYLOAD} bytes, not {payload_bytes}")
        if len(key) != KEY_BYTES:
            raise ConfigError(
                f"the key of the disk tier has {KEY_BYTES} bytes, not {len(key)}: put {KEY_BYTES} random bytes into the file "
                "that cache.disk_tier_key_file names",
                param="cache.disk_tier_key_file",
            )
        self.payload_bytes = payload_bytes
        self.padded_bytes = -(-payload_bytes // PAGE) * PAGE
        self.stride = PAGE + self.padded_bytes  # bytes of a slot
        self._seal_key = _derive(key, b"seal", 32)
        self._seed = int.from_bytes(_derive(key, b"sum", 8), "little")
        self._format = hashlib.blake2b(fingerprint, key=_derive(key, b"format", 32), digest_size=16).digest()

    def encode(self, digest: bytes, family: bytes, stamp: int, payload: memoryview) -> bytes:
        """Return the header [HEADER_BYTES] of a record. The interpreter lock is free while the payload is summed."""
        payload_sum = self._sum(payload)
        fields = _FIELDS.pack(_MAGIC, VERSION, 0, self.payload_bytes, stamp, self._format, digest, family, payload_sum)
        return fields + self._seal(fields)

    def decode(self, page: memoryview) -> Header | Outcome:
        """Return the header at the beginning of `page`, or EMPTY, FOREIGN or CORRUPT."""
        fields = bytes(page[: _FIELDS.size])
        magic, version, _, payload_bytes, stamp, form, digest, family, payload_sum = _FIELDS.unpack(fields)
        if magic != _MAGIC:
            return Outcome.CORRUPT if any(fields) else Outcome.EMPTY
        if version != VERSION or form != self._format or payload_bytes != self.payload_bytes:
            return Outcome.FOREIGN
        if self._seal(fields) != page[_FIELDS.size : HEADER_BYTES]:
            return Outcome.CORRUPT
        return Header(digest, family, stamp, payload_sum)

    def verify(self, page: memoryview, digest: bytes, payload: memoryview) -> Outcome:
        """Return OK if `page` and `payload` are the record of `digest`. The interpreter lock is free during the sum."""
        header = self.decode(page)
        if isinstance(header, Outcome):
            return header
        if header.digest != digest:
            return Outcome.OTHER
        return Outcome.OK if self._sum(payload) == header.sum else Outcome.CORRUPT

    def _sum(self, payload: memoryview) -> bytes:
        return xxhash.xxh3_128_digest(payload, seed=self._seed)

    def _seal(self, fields: bytes) -> bytes:
        return hashlib.blake2b(fields, key=self._seal_key, digest_size=_SEAL_BYTES).digest()


def _derive(key: bytes, purpose: bytes, size: int) -> bytes:
    return hashlib.blake2b(b"tidegate disk tier", key=key, person=purpose, digest_size=size).digest()
