"""The engine's settings, as frozen values.

None as a value means "choose automatically". `resolve` replaces every such value once and returns a new config; nothing
changes after that. Files, flags and environment variables are read by `server/settings_sources.py`, not here.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from engine.errors import ConfigError

STEP_TOKENS = 8192  # default of max_step_tokens on a GPU
OFFLINE_STEP_TOKENS = 16384  # default of max_step_tokens for an offline engine on a GPU: a long step delays no stream there
CPU_STEP_TOKENS = 512
HOST_BYTES_FOR_DISK = 1 << 30  # default of host_tier_bytes beside a disk tier
PAGE = 4096  # bytes; unit of direct I/O
MAX_HOST_SLOTS = 1 << 24  # the lists of more blocks would fill the memory of a small machine

Device = Literal["auto", "cpu", "cuda"]
DType = Literal["auto", "float32", "bfloat16", "float16"]
LoadFormat = Literal["safetensors", "dummy"]
RunnerKind = Literal["torch", "fake"]
BatchingPolicy = Literal["auto", "model", "aimd", "fixed"]


class CacheConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The KV cache. A block holds `block_size` tokens. `num_blocks`, if set, takes precedence over the two memory settings."""

    block_size: int = 64
    num_blocks: int | None = None
    memory_fraction: float = 0.9  # GPU: share of the memory that is free once the weights are loaded
    host_bytes: int = 4 << 30  # CPU: bytes of the KV cache; a page of memory is used once it is written to
    prefix_caching: bool = True
    # Newest tokens that stay in the device at least, of a request whose context is larger than the device's cache
    resident_tokens: int = 1024
    # Host memory for blocks that are evicted from the device, from where they come back; 0: none. None: none without a disk tier,
    # and HOST_BYTES_FOR_DISK with one, whose records pass through it.
    host_tier_bytes: int | None = None
    disk_tier_folder: str | None = None  # folder of the disk tier (`engine/kvcache/disk/`); None: there is none
    disk_tier_bytes: int = 0  # cap of the files in that folder
    disk_tier_write_rate: float | None = None  # bytes/s that may be written to them in the long run; None: no limit
    disk_tier_key_file: str | None = None  # file of 32 bytes, a key that replicas share; None: a random one in the folder


class SchedulerConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The limits of a step. Decodes and prompt chunks share `max_step_tokens`; at most `max_num_seqs` requests run at a time."""

    max_num_seqs: int = 256
    max_step_tokens: int | None = None
    max_queue: int = 4096  # largest number of waiting requests; a further request is refused
    max_queue_tokens: int = 4 << 20  # largest sum of the waiting requests' tokens; a request that would exceed it is refused
    max_skips: int = 32  # how many later requests may be admitted before a request that does not fit; then they wait behind it


class BatchingConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the limits of a step follow the measured times of steps (`engine/scheduler/controller.py`).

    `policy` is one of

    - fixed: the limits of SchedulerConfig, always. An offline engine is fixed, whatever is set.
    - aimd: `min_batch` to `max_batch` requests run at once: fewer if steps take over `step_high_ms`, more if under `step_low_ms`.
    - model: the largest step whose predicted time keeps the promised time between tokens; aimd while predictions are wrong.
    - auto: as model, but `cost_file` may be missing. Then aimd holds until the first predictions were right.

    The limits of SchedulerConfig bound every policy.
    """

    policy: BatchingPolicy = "auto"
    min_batch: int = 4  # aimd: requests that run at once
    max_batch: int = 64  # aimd
    step_low_ms: float = 30.0  # aimd
    step_high_ms: float = 50.0  # aimd
    cost_file: str | None = None  # step cost to start from, as `engine/scheduler/cost_file.py` writes it
    cost_folder: str | None = None  # folder in which learnt step costs are kept; `cost_file` goes first (`cost_folder.py`)


class FakeConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """FakeRunner's simulated device.

    A step takes `step_ms` plus `token_us` for each of its tokens, or else as long as `cost_file` says.
    """

    step_ms: float = 0.0
    token_us: float = 0.0
    cost_file: str | None = None  # simulate the device and model of this file of step costs
    num_blocks: int = 4096
    block_bytes: int = 1 << 20  # bytes that a block takes in a lower tier
    host_gb_s: float = 0.0  # bandwidth of moves between device and host tier, in 10^9 bytes a second; 0: they take no time
    failing_moves: float = 0.0  # share of the moves between tiers that fail
    nan_token: int | None = None  # a row that would sample this token id reports logits that are not finite; None: no such token


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The settings of one engine: the checkpoint folder, the device, the runner, the cache and the scheduler."""

    model: str
    device: Device = "auto"
    dtype: DType = "auto"
    load_format: LoadFormat = "safetensors"
    runner: RunnerKind = "torch"  # "fake" computes nothing; it serves load tests of everything above the device
    max_model_len: int | None = None
    seed: int = 0  # seed of dummy weights
    overlap: bool | None = None  # submit step N+1 before step N's tokens are read; None: on if the device is asynchronous
    cuda_graphs: bool | None = None  # replay captured steps; None: on if the model allows it
    startup_budget_s: float = 3.0  # seconds to prepare steps before the engine takes requests; offline nothing is prepared
    kernel_folder: str | None = None  # folder of kernels that `tidegate compile` made; None: compile what Triton's cache lacks
    offline: bool = False  # no client waits for single tokens, so steps may be larger; for use as a library
    debug_checks: bool = False  # run all consistency checks after each step
    cache: CacheConfig = CacheConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
    batching: BatchingConfig = BatchingConfig()
    fake: FakeConfig = FakeConfig()


class ModelLimits(msgspec.Struct, frozen=True, kw_only=True):
    """The limits of a model that the scheduler and the service need, read from its checkpoint folder."""

    max_model_len: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    dtype: Literal["float32", "bfloat16", "float16"]
    sliding_window: int | None = None  # longest context in which the model's sliding windows change nothing; None: no windows


def resolve(config: EngineConfig, limits: ModelLimits, *, has_cuda: bool) -> EngineConfig:
    """Return `config` with every automatic value chosen except `cache.num_blocks`, which is known once the weights are loaded.

    Raises ConfigError, naming the setting, for a value that cannot work.
    """
    check(config, limits, has_cuda=has_cuda)
    device = config.device if config.device != "auto" else ("cuda" if has_cuda else "cpu")
    # The default on a CPU is float32: all CPUs multiply float32 fast, and few of them multiply bfloat16 fast.
    auto_dtype = limits.dtype if device == "cuda" else "float32"
    gpu_tokens = OFFLINE_STEP_TOKENS if config.offline else STEP_TOKENS
    step_tokens = config.scheduler.max_step_tokens or (gpu_tokens if device == "cuda" else CPU_STEP_TOKENS)
    return msgspec.structs.replace(
        config,
        device=device,
        dtype=auto_dtype if config.dtype == "auto" else config.dtype,
        max_model_len=config.max_model_len or limits.max_model_len,
        overlap=(device == "cuda") if config.overlap is None else config.overlap,
        cache=msgspec.structs.replace(config.cache, host_tier_bytes=_host_tier_bytes(config.cache)),
        scheduler=msgspec.structs.replace(
            config.scheduler,
            max_step_tokens=max(step_tokens, config.scheduler.max_num_seqs),
        ),
    )


def fit_cache(config: EngineConfig, num_blocks: int, *, asked: int | None, spill_bytes: int | None = None) -> EngineConfig:
    """Return the resolved `config` for a cache of `num_blocks`, with max_model_len reduced to what the cache can hold.

    One request must fit into the cache alone, or into the cache and the host tier if `asked`, the operator's own max_model_len,
    says so. `spill_bytes` is the size of a block that lies in the host tier; None: contexts cannot continue there.
    Raises ConfigError if `asked` does not fit.
    """
    size = config.cache.block_size
    held = num_blocks * size
    if asked is not None and asked > held:
        _check_spill(config, num_blocks, asked, spill_bytes)
        held = asked
    return msgspec.structs.replace(
        config,
        max_model_len=min(config.max_model_len or held, held),
        cache=msgspec.structs.replace(config.cache, num_blocks=num_blocks),
    )


def _check_spill(config: EngineConfig, num_blocks: int, asked: int, spill_bytes: int | None) -> None:
    """Raise ConfigError unless cache and host tier together hold a context of `asked` tokens, more than the cache holds."""
    size, remedy, beside = config.cache.block_size, "set a smaller max_model_len, or give the cache more memory", ""
    if spill_bytes is not None:
        slots, each = host_slots(config, spill_bytes), host_stride(config, spill_bytes)
        missing = -(-asked // size) - num_blocks
        if missing <= slots:
            return
        beside = f", and the host tier {slots * size} more (cache.host_tier_bytes is {config.cache.host_tier_bytes})"
        remedy += f", or set cache.host_tier_bytes to at least {missing * each}"
    raise ConfigError(
        f"max_model_len is {asked}, but the KV cache holds {num_blocks * size} tokens ({num_blocks} blocks of {size}){beside}: "
        f"{remedy}",
        param="max_model_len",
    )


def _host_tier_bytes(cache: CacheConfig) -> int:
    if cache.host_tier_bytes is not None:
        return cache.host_tier_bytes
    return 0 if cache.disk_tier_folder is None else HOST_BYTES_FOR_DISK


def host_stride(config: EngineConfig, block_bytes: int) -> int:
    """Return the bytes that a block of `block_bytes` takes in the host tier: whole pages if records go to a disk from there."""
    return block_bytes if config.cache.disk_tier_folder is None else -(-block_bytes // PAGE) * PAGE


def host_slots(config: EngineConfig, block_bytes: int) -> int:
    """Return how many blocks of so many bytes the host tier of a resolved config holds.

    Raises ConfigError if it is on and cannot hold one, or if it would hold more than MAX_HOST_SLOTS.
    """
    size, each = config.cache.host_tier_bytes or 0, host_stride(config, block_bytes)
    if 0 < size < each:
        raise ConfigError(
            f"cache.host_tier_bytes is {size}, and one block takes {each}: raise it, or set it to 0 for no host tier",
            param="cache.host_tier_bytes",
        )
    if size // each > MAX_HOST_SLOTS:
        raise ConfigError(
            f"cache.host_tier_bytes is {size}, which is {size // each} blocks of {each} bytes: the host tier holds "
            f"at most {MAX_HOST_SLOTS} blocks, so set at most {MAX_HOST_SLOTS * each}",
            param="cache.host_tier_bytes",
        )
    return size // each


def check(config: EngineConfig, limits: ModelLimits, *, has_cuda: bool) -> None:
    """Raise ConfigError for a setting that cannot work. The message names the setting, its value and what would be right."""
    cache, sched = config.cache, config.scheduler
    _at_least("cache.block_size", cache.block_size, 1)
    _at_least("cache.num_blocks", cache.num_blocks, 1)
    _at_least("cache.host_bytes", cache.host_bytes, 1)
    _at_least("cache.resident_tokens", cache.resident_tokens, 1)
    _at_least("cache.host_tier_bytes", cache.host_tier_bytes, 0)
    _at_least("cache.disk_tier_bytes", cache.disk_tier_bytes, 0)
    _at_least("scheduler.max_num_seqs", sched.max_num_seqs, 1)
    _at_least("scheduler.max_step_tokens", sched.max_step_tokens, sched.max_num_seqs)
    _at_least("scheduler.max_queue", sched.max_queue, 1)
    _at_least("scheduler.max_queue_tokens", sched.max_queue_tokens, 1)
    _at_least("scheduler.max_skips", sched.max_skips, 0)
    _at_least("max_model_len", config.max_model_len, 1)
    _check_batching(config.batching, config.offline)
    if config.fake.cost_file is not None and (config.fake.step_ms or config.fake.token_us):
        raise ConfigError(
            "fake.cost_file is set beside fake.step_ms or fake.token_us: set either the file or the two durations",
            param="fake.cost_file",
        )
    _check_tiers(cache)
    if not 0 < cache.memory_fraction <= 1:
        raise ConfigError(
            f"cache.memory_fraction is {cache.memory_fraction}: it must lie in (0, 1]", param="cache.memory_fraction"
        )
    if config.max_model_len is not None and config.max_model_len > limits.max_model_len:
        raise ConfigError(
            f"max_model_len is {config.max_model_len}, but the model was made for {limits.max_model_len} tokens at most",
            param="max_model_len",
        )
    length, window = config.max_model_len or limits.max_model_len, limits.sliding_window
    if window is not None and length > window:
        raise ConfigError(
            f"max_model_len is {length}, but layers of the model attend only to the latest {window} tokens (sliding_window in "
            f"config.json), which is supported only for contexts that fit into them: set max_model_len to at most {window}",
            param="max_model_len",
        )
    if config.device == "cuda" and not has_cuda:
        raise ConfigError(
            "device is 'cuda', but torch sees no CUDA device here: use device 'cpu' or 'auto', or run `tidegate doctor`",
            param="device",
        )


def _check_tiers(cache: CacheConfig) -> None:
    host, folder = cache.host_tier_bytes, cache.disk_tier_folder
    if host and not cache.prefix_caching:
        raise ConfigError(
            f"cache.host_tier_bytes is {host}, and cache.prefix_caching is off: without it no evicted block is "
            "found again. Turn prefix_caching on, or set host_tier_bytes to 0",
            param="cache.host_tier_bytes",
        )
    if folder is None:
        for name in ("disk_tier_bytes", "disk_tier_write_rate", "disk_tier_key_file"):
            if getattr(cache, name):
                raise ConfigError(
                    f"cache.{name} is set, and cache.disk_tier_folder is not: name the folder of the disk tier, or unset {name}",
                    param=f"cache.{name}",
                )
        return
    if not cache.prefix_caching:
        raise ConfigError(
            "cache.disk_tier_folder is set, and cache.prefix_caching is off: without it no block is found again. "
            "Turn prefix_caching on, or unset disk_tier_folder",
            param="cache.disk_tier_folder",
        )
    if host == 0:
        raise ConfigError(
            "cache.disk_tier_folder is set, and cache.host_tier_bytes is 0: records of the disk pass through host memory. "
            f"Raise host_tier_bytes, or leave it unset for {HOST_BYTES_FOR_DISK}",
            param="cache.host_tier_bytes",
        )
    if cache.disk_tier_bytes == 0:
        raise ConfigError(
            "cache.disk_tier_folder is set, and cache.disk_tier_bytes is not: set how many bytes its files may take",
            param="cache.disk_tier_bytes",
        )


def _check_batching(batching: BatchingConfig, offline: bool) -> None:
    _at_least("batching.min_batch", batching.min_batch, 1)
    if batching.max_batch < batching.min_batch:
        raise ConfigError(
            f"batching.max_batch is {batching.max_batch}, and batching.min_batch is {batching.min_batch}: set a max_batch that "
            "is at least as large",
            param="batching.max_batch",
        )
    for name, value in (("step_low_ms", batching.step_low_ms), ("step_high_ms", batching.step_high_ms)):
        if not 0 < value < float("inf"):
            raise ConfigError(
                f"batching.{name} is {value}: set a finite number of milliseconds above 0", param=f"batching.{name}"
            )
    if batching.step_low_ms >= batching.step_high_ms:
        raise ConfigError(
            f"batching.step_low_ms is {batching.step_low_ms}, and batching.step_high_ms is {batching.step_high_ms}: the batch "
            "grows below step_low_ms and shrinks above step_high_ms, so step_low_ms must be the smaller one",
            param="batching.step_low_ms",
        )
    if batching.policy == "model" and batching.cost_file is None and not offline:
        raise ConfigError(
            "batching.policy is 'model', but batching.cost_file is not set: name a file of step costs of this device and model, "
            "or set the policy 'auto', which learns the costs while it serves",
            param="batching.cost_file",
        )


def _at_least(name: str, value: int | None, low: int) -> None:
    if value is not None and value < low:
        raise ConfigError(f"{name} is {value}: it must be at least {low}", param=name)
