"""The doctor's measurements of the KV cache's tiers: what moves between the device and host memory, and to and from the disk."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import msgspec

from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.kvcache.disk.rates import file_bytes, measure
from server.findings import Finding
from server.settings_sources import in_settings_names

MEASURED_BYTES = 128 << 20  # about so much is written to the disk, and read
MIN_RECORDS = 16  # but at least so many records, if they are large
PROBE_SECONDS = 300  # time that the process has to import torch, to make a KV cache and to move blocks


class MoveRates(msgspec.Struct, frozen=True):
    """The answer of `engine.device.move_rates`, which runs in another process, since the server must not import torch."""

    record_bytes: int = 0
    block_size: int = 0
    out_gb_s: float = 0.0
    in_gb_s: float = 0.0
    problem: str | None = None


def tiers(config: EngineConfig, *, has_torch: bool) -> list[Finding]:
    """Measure the tiers that are on. The model of `config` must be one that an engine can serve."""
    cache = config.cache
    if not cache.host_tier_bytes and cache.disk_tier_folder is None:
        return []
    if config.runner == "fake":
        host, record_bytes = Finding("host tier", "note", "not measured: the runner is fake"), config.fake.block_bytes
    elif not has_torch:
        return [Finding("host tier", "note", "not measured: that needs torch")]
    else:
        host, record_bytes = _host(config)
    if cache.disk_tier_folder is None or not record_bytes:
        return [host]
    return [host, disk(Path(cache.disk_tier_folder), cache.disk_tier_bytes, record_bytes, cache.block_size)]


def _host(config: EngineConfig) -> tuple[Finding, int]:
    """Return what was found of the host tier, and the bytes of a block, or 0 if the model has no answer."""
    what, command = "host tier", [sys.executable, "-m", "engine.device.move_rates", msgspec.json.encode(config).decode()]
    try:
        probe = subprocess.run(command, capture_output=True, timeout=PROBE_SECONDS, check=True)
        rates = msgspec.json.decode(probe.stdout, type=MoveRates)
    except subprocess.CalledProcessError as error:
        lines = error.stderr.decode(errors="replace").strip().splitlines()
        return Finding(what, "note", f"cannot be measured: {lines[-1] if lines else error}"), 0
    except (subprocess.TimeoutExpired, msgspec.MsgspecError) as error:
        return Finding(what, "note", f"cannot be measured: {error}"), 0
    if rates.problem is not None:
        return Finding(what, "missing", in_settings_names(rates.problem)), 0
    speeds = f"{rates.out_gb_s:.2f} GB/s from the device, {rates.in_gb_s:.2f} GB/s to it"
    text = f"{speeds}; {_worth(rates.in_gb_s, rates.record_bytes, rates.block_size)}"
    return Finding(what, "ok", text), rates.record_bytes


def disk(folder: Path, max_bytes: int, record_bytes: int, block_size: int) -> Finding:
    """Measure a disk tier of `max_bytes` in `folder` with records of `record_bytes`, each a block of `block_size` tokens.

    The records that are measured lie in a folder of their own inside `folder`, which is removed. A server may use `folder`
    meanwhile.
    """
    what = "disk tier"
    if folder.exists() and not folder.is_dir():
        return Finding(what, "missing", f"disk_tier_folder is {folder}, which is not a folder")
    number = max(MIN_RECORDS, MEASURED_BYTES // record_bytes)
    number = min(number, max_bytes // file_bytes(record_bytes, 1))
    if not number:
        text = f"disk_tier_bytes is {max_bytes}, and a file of one record takes {file_bytes(record_bytes, 1)}: raise it"
        return Finding(what, "missing", text)
    try:
        with _scratch(folder) as inner:
            free = shutil.disk_usage(inner).free
            if file_bytes(record_bytes, number) > free:
                text = f"not measured: that writes {file_bytes(record_bytes, number)} bytes, and {free} are free at {folder}"
                return Finding(what, "note", text)
            rates = measure(inner, record_bytes, number)
    except (ConfigError, OSError) as error:
        return Finding(what, "note", f"the tier would be off: {error} (at {folder})")
    way = "direct I/O" if rates.is_direct else "the page cache"
    speeds = f"writes {rates.write_gb_s:.2f} GB/s and reads {rates.read_gb_s:.2f} GB/s by {way}"
    loads = _worth(rates.read_gb_s, record_bytes, block_size)
    return Finding(what, "ok", f"{speeds}, in records of {record_bytes} bytes; {loads}")


def _worth(gb_s: float, record_bytes: int, block_size: int) -> str:
    tokens = gb_s * 1e9 / record_bytes * block_size
    return f"that loads {tokens:,.0f} tokens/s: it helps if the device computes prompts more slowly"


@contextlib.contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    """Make an empty folder inside `folder`, and remove it, with those above it that were not there before."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="doctor-", dir=folder) as inner:
            yield Path(inner)
    finally:
        with contextlib.suppress(OSError):  # a server has begun to use the folder
            for path in missing:
                path.rmdir()
