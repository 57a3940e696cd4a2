"""Defines the settings of the server.

`Settings` is the only list of settings: the flags of `tidegate serve`, the environment variables and the YAML keys are made from
its fields. It is frozen, and is sent to the workers as JSON. `server.settings_sources` reads one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import msgspec
from pydantic import AfterValidator, BeforeValidator, Field, StringConstraints, ValidationInfo, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from engine.config import BatchingPolicy, Device, DType, EngineConfig, LoadFormat, RunnerKind
from engine.errors import ConfigError
from engine.request import BOUNDS
from engine.slo import SloName
from server import bundled

PREFIX = "TIDEGATE_"

_ENGINE = EngineConfig(model="")
_CACHE, _SCHEDULER, _BATCHING, _FAKE = _ENGINE.cache, _ENGINE.scheduler, _ENGINE.batching, _ENGINE.fake
_PREFIXES = {"cache": "", "scheduler": "", "batching": "", "fake": "fake_"}  # group of EngineConfig -> prefix of its settings
_OTHER_NAMES = {"batching.policy": "batching"}
ENGINE_NAMES = {
    f"{group}.{field}": _OTHER_NAMES.get(f"{group}.{field}", prefix + field)
    for group, prefix in _PREFIXES.items()
    for field in getattr(_ENGINE, group).__struct_fields__
}
"""Field of a group of EngineConfig, such as fake.step_ms -> name of its setting, fake_step_ms."""

PRIORITY = BOUNDS["priority"]
MAX_SECONDS = 1_000_000  # upper limit of all durations: gRPC takes 2^31 milliseconds at most


def _split(value: object) -> object:
    """Split a text at its commas, since flags and environment variables are texts. A YAML file may also have a list."""
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


def _as_browsers_write_it(origin: str) -> str:
    """Return `origin` in small letters and without the port that its scheme has anyway: browsers send it so."""
    origin = origin.lower()
    port = {"http": ":80", "https": ":443"}.get(origin.partition("://")[0], "")
    return origin.removesuffix(port)


_Listed = (BeforeValidator(_split), NoDecode)
Origin = Annotated[
    str,
    StringConstraints(pattern=r"^(\*|null|[A-Za-z][A-Za-z0-9+.-]*://[A-Za-z0-9._:\[\]-]+)$"),
    AfterValidator(_as_browsers_write_it),
    Field(description="an origin such as https://chat.example (no path), or * for all; separate several by commas"),
]
HostName = Annotated[
    str,
    StringConstraints(pattern=r"^[A-Za-z0-9._-]+$"),
    Field(description="a host name such as chat.example (no port); separate several by commas"),
]


class Settings(BaseSettings):
    """Holds all settings of the server. `Settings(port=0)` also reads TIDEGATE_* variables from the environment, but no YAML
    file. An empty variable counts as not set."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, env_ignore_empty=True, frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=()
    )

    # The model and the addresses. The default host is the loopback address, since API keys are off by default: anyone who can
    # reach the port can use the accelerator. In a container, set 0.0.0.0.
    model: str | None = Field(None, min_length=1, description="Checkpoint folder; by default the bundled model Tidepool")
    served_model_name: str | None = Field(None, min_length=1, description="Model name in the API; by default its folder's")
    generation_config: Literal["auto", "off"] = Field(
        "auto", description="auto: sampling defaults come from the model's generation_config.json; off: from this server"
    )
    host: str = Field("127.0.0.1", min_length=1, description="Address to listen on; 0.0.0.0 or :: for every interface")
    port: int = Field(8000, ge=0, le=65535, description="HTTP port; 0 means any free port")
    grpc_port: int = Field(9000, ge=0, le=65535, description="gRPC port; 0 means any free port")
    # The admin port is open by default, since it can be reached from this machine only and has only routes of the HTTP port.
    admin_host: str = Field("127.0.0.1", min_length=1, description="Address of the admin port")
    admin_port: int = Field(9001, ge=0, le=65535, description="Port for health and metrics; 0 means any free port")
    # A foreign web page must not use a server that listens on the loopback address: see `server.http.front`.
    cors_origins: Annotated[tuple[Origin, ...], *_Listed] = Field((), description="Origins whose web pages may use the API")
    allowed_hosts: Annotated[tuple[HostName, ...], *_Listed] = Field(
        (),
        description="Host names by which web pages may reach the server, beside localhost and addresses. Checked if the server "
        "listens on a loopback address or this list is not empty",
    )
    strict_fields: bool = Field(True, description="Refuse unknown fields of requests; if off, ignore and report them")
    log_requests: bool = Field(True, description="Log one line for each request: id, route, status, tokens and times")
    api_workers: int = Field(1, ge=1, le=256, description="Number of processes that serve HTTP and gRPC")

    # Limits on the size, number and slowness of a client's requests.
    max_body_bytes: int = Field(4 << 20, ge=1024, le=1 << 30, description="Largest request body (HTTP) or message (gRPC)")
    max_header_bytes: int = Field(32 << 10, ge=1024, le=1 << 20, description="Largest sum of request line and headers")
    header_timeout_s: float = Field(10, gt=0, le=MAX_SECONDS, description="Seconds within which a request's headers must arrive")
    body_timeout_s: float = Field(30, gt=0, le=MAX_SECONDS, description="Seconds within which a request's body must arrive")
    idle_timeout_s: float = Field(75, gt=0, le=MAX_SECONDS, description="Seconds that a connection may be idle between requests")
    send_timeout_s: float = Field(
        60, gt=0, le=MAX_SECONDS, description="Seconds that a client may read nothing before its stream ends"
    )
    max_waiting_text_bytes: int = Field(
        64 << 20, ge=1 << 20, description="Bytes of long texts that may wait for one worker's tokenizer; more are refused"
    )
    max_connections: int | None = Field(
        None,
        ge=1,
        description="Largest number of HTTP connections of one API worker; by default what the limit of open files allows",
    )
    # A call takes about 10 KB. 8192 is twice the default max_queue, so a full queue leaves as many calls for other methods.
    max_grpc_calls: int = Field(8192, ge=1, description="Largest number of gRPC calls that one API worker runs at once")
    max_n: int = Field(16, ge=1, le=128, description="Largest number of outputs (n) of one request")
    max_stop_strings: int = Field(16, ge=0, le=1024, description="Largest number of stop strings of one request")
    max_stop_len: int = Field(256, ge=1, le=65536, description="Largest length of a stop string, in characters")
    max_logprobs: int = Field(1 << 22, ge=0, description="Most log-probabilities in one answer, alternatives included")
    max_prompt_logprobs: int = Field(1 << 17, ge=0, description="Most log-probabilities for the prompts of one request")

    # Starting, failing and stopping. Processes report progress a few times a second: a timeout below 1 would kill healthy ones.
    start_timeout_s: float = Field(
        300, ge=1, le=MAX_SECONDS, description="Seconds that a starting process may report no progress until replaced"
    )
    stall_timeout_s: float = Field(
        30, ge=1, le=MAX_SECONDS, description="Seconds that one step may take until the engine is replaced"
    )
    worker_stall_timeout_s: float = Field(
        20, ge=1, le=MAX_SECONDS, description="Seconds that an API worker may hang until it is replaced"
    )
    crash_limit: int = Field(
        5, ge=1, le=1 << 16, description="Deaths of a process, with no work done in between, that end the server"
    )
    crash_window_s: float = Field(
        60, gt=0, le=MAX_SECONDS, description="Seconds of readiness after which a death does not count in crash_limit"
    )
    resume_timeout_s: float = Field(
        120, gt=0, le=MAX_SECONDS, description="Seconds that streams wait for a new engine after a death"
    )
    max_deaths: int = Field(
        3, ge=1, le=1 << 16, description="Engine deaths during a request that end the request, which may be the cause"
    )
    drain_timeout_s: float = Field(
        30, ge=0, le=MAX_SECONDS, description="Seconds for running requests to finish after SIGTERM or SIGHUP"
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Lowest level of log lines written")
    log_format: Literal["auto", "human", "json"] = Field("auto", description="auto: human at a terminal, JSON otherwise")

    # What is promised to callers without a key, and what they may ask for.
    slo_class: SloName | None = Field(
        None, description="Latency class of requests that name none; by default standard, of which nothing is then promised"
    )
    priority_ceiling: int = Field(
        int(PRIORITY.low), ge=int(PRIORITY.low), le=int(PRIORITY.high), description="Most urgent priority that a request may name"
    )

    # Settings of the engine, which engine/config.py explains. If the default is None, the engine chooses the value.
    device: Device = Field("auto", description="Device of the engine")
    dtype: DType = Field("auto", description="Number format of weights and activations")
    load_format: LoadFormat = Field("safetensors", description="Source of the weights; dummy: random weights of the right shapes")
    runner: RunnerKind = Field("torch", description="What runs the steps; fake: no model and made-up tokens, for load tests")
    max_model_len: int | None = Field(None, ge=1, description="Context length in tokens; by default the model's")
    seed: int = Field(0, ge=0, description="Seed of dummy weights")
    overlap: bool | None = Field(None, description="Submit a step before the tokens of the previous step are read")
    cuda_graphs: bool | None = Field(None, description="Replay steps that were captured as CUDA graphs")
    kernel_folder: str | None = Field(
        None, min_length=1, description="Folder of kernels that `tidegate compile` made; what it lacks is compiled at start"
    )
    startup_budget_s: float = Field(
        _ENGINE.startup_budget_s, ge=0, le=MAX_SECONDS, description="Seconds to prepare steps on a GPU before requests are taken"
    )
    debug_checks: bool = Field(False, description="Check all invariants after each step; slow")
    block_size: int = Field(_CACHE.block_size, ge=1, le=1 << 16, description="Tokens in one block of the KV cache")
    num_blocks: int | None = Field(_CACHE.num_blocks, ge=1, description="Blocks of the KV cache; overrides memory_fraction")
    memory_fraction: float = Field(
        _CACHE.memory_fraction, gt=0, le=1, description="Fraction of free device memory for the KV cache"
    )
    host_bytes: int = Field(_CACHE.host_bytes, ge=1, description="Bytes of the KV cache if the device is the CPU")
    host_tier_bytes: int | None = Field(
        _CACHE.host_tier_bytes,
        ge=0,
        description="Host memory for KV blocks that leave the device; 0: none. Unset: 1 GiB beside a disk tier, else none",
    )
    resident_tokens: int = Field(
        _CACHE.resident_tokens,
        ge=1,
        le=1 << 24,
        description="Fewest newest tokens that stay on the device of a context larger than its cache; the host tier has the rest",
    )
    disk_tier_folder: str | None = Field(
        _CACHE.disk_tier_folder, min_length=1, description="Folder for KV blocks on disk, which outlive the server; unset: none"
    )
    disk_tier_bytes: int = Field(_CACHE.disk_tier_bytes, ge=0, description="Most bytes of the files in disk_tier_folder")
    disk_tier_write_rate: float | None = Field(
        _CACHE.disk_tier_write_rate,
        gt=0,
        le=1e15,
        description="Bytes/s that are written to disk_tier_folder; unset: no limit",
    )
    disk_tier_key_file: str | None = Field(
        _CACHE.disk_tier_key_file,
        min_length=1,
        description="File of 32 random bytes that seals the records on disk; unset: a key in the folder itself",
    )
    prefix_caching: bool = Field(_CACHE.prefix_caching, description="Reuse KV blocks for equal prompt prefixes")
    max_num_seqs: int = Field(_SCHEDULER.max_num_seqs, ge=1, le=1 << 16, description="Largest number of outputs that run at once")
    max_step_tokens: int | None = Field(
        _SCHEDULER.max_step_tokens, ge=1, le=1 << 24, description="Largest number of tokens in one step"
    )
    max_queue: int = Field(
        _SCHEDULER.max_queue, ge=1, le=1 << 24, description="Largest number of waiting outputs; more are refused"
    )
    max_queue_tokens: int = Field(
        _SCHEDULER.max_queue_tokens, ge=1, le=1 << 32, description="Largest sum of tokens of waiting outputs; more are refused"
    )
    max_skips: int = Field(
        _SCHEDULER.max_skips, ge=0, le=1 << 24, description="Times that others may overtake a request that does not fit"
    )
    batching: BatchingPolicy = Field(
        _BATCHING.policy,
        description="What sets the size of a step. fixed: max_num_seqs and max_step_tokens; aimd: measured times of steps; "
        "model: predicted times, at first from cost_file; auto: predicted times, which may be learnt while the server runs",
    )
    min_batch: int = Field(
        _BATCHING.min_batch, ge=1, le=1 << 16, description="Outputs that may run at once under batching aimd, at least"
    )
    max_batch: int = Field(
        _BATCHING.max_batch, ge=1, le=1 << 16, description="Outputs that may run at once under batching aimd, at most"
    )
    step_low_ms: float = Field(
        _BATCHING.step_low_ms, gt=0, le=1e6, description="Milliseconds of a step under which batching aimd runs more outputs"
    )
    step_high_ms: float = Field(
        _BATCHING.step_high_ms, gt=0, le=1e6, description="Milliseconds of a step over which batching aimd runs fewer outputs"
    )
    cost_file: str | None = Field(
        None, min_length=1, description="File of the times of steps on this device with this model, to predict them from"
    )
    cost_folder: str | None = Field(
        None,
        min_length=1,
        description="Folder that keeps learnt times of steps, from which the next start predicts if there is no cost_file",
    )
    fake_step_ms: float = Field(_FAKE.step_ms, ge=0, le=1e6, description="Fake runner: milliseconds that each step takes")
    fake_token_us: float = Field(
        _FAKE.token_us, ge=0, le=1e6, description="Fake runner: microseconds that each token adds to a step"
    )
    fake_cost_file: str | None = Field(
        None, min_length=1, description="Fake runner: a cost_file, whose device and model it imitates instead of the two above"
    )
    fake_num_blocks: int = Field(_FAKE.num_blocks, ge=1, le=1 << 24, description="Fake runner: blocks of the KV cache")
    fake_block_bytes: int = Field(
        _FAKE.block_bytes, ge=1, le=1 << 40, description="Fake runner: bytes that a KV block takes in host memory"
    )
    fake_host_gb_s: float = Field(
        _FAKE.host_gb_s, ge=0, le=1e6, description="Fake runner: GB/s of moves between device and host memory; 0: without limit"
    )
    fake_failing_moves: float = Field(
        _FAKE.failing_moves, ge=0, le=1, description="Fake runner: fraction of moves of KV blocks that fail"
    )
    fake_nan_token: int | None = Field(
        _FAKE.nan_token, ge=0, description="Fake runner: a row that would sample this token id reports logits that are not finite"
    )

    @field_validator("*", mode="before")
    @classmethod
    def _no_bool_for_a_number(cls, value: object, info: ValidationInfo) -> object:
        """Refuse true and false for a number. YAML reads `port: yes` as true, and pydantic would accept true as 1."""
        if value is False and info.field_name == "generation_config":
            return "off"  # YAML reads `off` as false
        kind = cls.model_fields[info.field_name or ""].annotation
        if isinstance(value, bool) and bool not in (kind, *get_args(kind)):
            raise ValueError("a truth value")
        return value

    @property
    def model_name(self) -> str:
        """Return the name that API clients use for the model."""
        return self.served_model_name or (Path(self.model).resolve().name if self.model else bundled.NAME)

    def engine_config(self) -> EngineConfig:
        if self.model is None:
            raise ConfigError("model is not set: name a checkpoint folder", param="model")
        parts: dict[str, Any] = {group: self._group(group) for group in _PREFIXES}
        own = [name for name in EngineConfig.__struct_fields__ if name in Settings.model_fields and name not in parts]
        return EngineConfig(**parts, **{name: getattr(self, name) for name in own})

    def _group(self, name: str) -> msgspec.Struct:
        """Make the group `name` of EngineConfig. Each of its fields has a setting."""
        kind: type[msgspec.Struct] = type(getattr(_ENGINE, name))
        return kind(**{field: getattr(self, ENGINE_NAMES[f"{name}.{field}"]) for field in kind.__struct_fields__})
