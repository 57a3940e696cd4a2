"""Opens the disk tier that a config names, for the KV blocks of a runner."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from engine.config import CacheConfig
from engine.errors import ConfigError, InternalError
from engine.kvcache.disk.records import KEY_BYTES
from engine.kvcache.disk.settings import DiskSettings
from engine.kvcache.disk.store import DiskStore
from engine.kvcache.disk_tier import DiskTier
from engine.kvcache.identity import BlockIdentity, identity_of
from engine.kvcache.kinds import HitRule
from engine.plan import BuiltRunner

MIN_THREADS, MAX_THREADS = 4, 16  # of the disk tier. A thread reads and checks some GB/s at most


class OpenTiers(NamedTuple):
    identity: BlockIdentity  # whose key is that of the disk tier, if there is one
    disk: DiskTier | None


def open_tiers(built: BuiltRunner, clock: Callable[[], float]) -> OpenTiers:
    """Return the identity of the runner's blocks, and the disk tier if `cache.disk_tier_folder` names one.

    Raises ConfigError if the folder is in use or cannot be one, or if the cap or the key does not fit.
    """
    cache = built.config.cache
    if cache.disk_tier_folder is None:
        return OpenTiers(identity_of(built.kv, cache.block_size), None)
    if built.host is None:
        raise InternalError("there is a disk tier, and the runner has no host tier")
    settings = _settings(cache, Path(cache.disk_tier_folder))
    facts = hashlib.blake2b(identity_of(built.kv, cache.block_size).facts).digest()
    store = DiskStore(settings, built.host.record_bytes, facts, clock)
    rule = HitRule(built.kv.kinds, cache.block_size)
    return OpenTiers(identity_of(built.kv, cache.block_size, store.key), DiskTier(store, built.host, rule.inner))


def _settings(cache: CacheConfig, folder: Path) -> DiskSettings:
    return DiskSettings(
        folder=folder,
        max_bytes=cache.disk_tier_bytes,
        key=None if cache.disk_tier_key_file is None else _read_key(Path(cache.disk_tier_key_file)),
        write_rate=cache.disk_tier_write_rate,
        num_threads=min(MAX_THREADS, max(MIN_THREADS, os.cpu_count() or 1)),
    )


def _read_key(path: Path) -> bytes:
    """Return the key in a file. Raises ConfigError if it cannot be read or is not a key."""
    try:
        key = path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"cache.disk_tier_key_file is {path}, which cannot be read: {error.strerror}", param="cache.disk_tier_key_file"
        ) from error
    if len(key) != KEY_BYTES:
        raise ConfigError(
            f"cache.disk_tier_key_file is {path}, which has {len(key)} bytes: a key has {KEY_BYTES} random bytes, "
            f"as `head -c {KEY_BYTES} /dev/urandom` makes them",
            param="cache.disk_tier_key_file",
        )
    return key
