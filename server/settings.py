"""Defines the settings of the server. They are merged from flags > TIDEGATE_* environment > YAML file > the defaults below.

`Settings` is the only list of settings: the flags of `tidegate serve`, the environment variables and the YAML keys are made from
its fields. It is frozen, and is sent to the workers as JSON. `load_settings` makes one; ConfigError is all that it raises.
"""

from __future__ import annotations

import difflib
import itertools
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BeforeValidator, Field, StringConstraints, ValidationError, ValidationInfo, field_validator
from pydantic_core import ErrorDetails
from pydantic_settings import BaseSettings, EnvSettingsSource, NoDecode, SettingsConfigDict

from engine.config import CacheConfig, Device, DType, EngineConfig, FakeConfig, LoadFormat, RunnerKind, SchedulerConfig
from engine.errors import ConfigError
from server import bundled

PREFIX = "TIDEGATE_"
CONFIG_VARIABLE = "TIDEGATE_CONFIG"  # the path of the YAML file; `--config` has precedence

_CACHE, _SCHEDULER, _FAKE, _ENGINE = CacheConfig(), SchedulerConfig(), FakeConfig(), EngineConfig(model="")
_ENGINE_PREFIX = {"cache": "", "scheduler": "", "fake": "fake_"}  # group of EngineConfig -> prefix of its settings' names
_GROUPED = {f"{group}.{name}" for group in _ENGINE_PREFIX for name in getattr(EngineConfig(model=""), group).__struct_fields__}
_ENGINE_NAME = re.compile(rf"\b({'|'.join(map(re.escape, sorted(_GROUPED)))})\b")

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
    prefix_caching: bool = Field(_CACHE.prefix_caching, description="Reuse KV blocks for equal prompt prefixes")
    max_num_seqs: int = Field(_SCHEDULER.max_num_seqs, ge=1, le=1 << 16, description="Largest number of outputs that run at once")
    max_step_tokens: int | None = Field(
        _SCHEDULER.max_step_tokens, ge=1, le=1 << 24, description="Largest number of tokens in one step"
    )
    max_queue: int = Field(
        _SCHEDULER.max_queue, ge=1, le=1 << 24, description="Largest number of waiting outputs; more are refused"
    )
    max_skips: int = Field(
        _SCHEDULER.max_skips, ge=0, le=1 << 24, description="Times that others may overtake a request that does not fit"
    )
    fake_step_ms: float = Field(_FAKE.step_ms, ge=0, le=1e6, description="Fake runner: milliseconds that each step takes")
    fake_token_us: float = Field(
        _FAKE.token_us, ge=0, le=1e6, description="Fake runner: microseconds that each token adds to a step"
    )
    fake_num_blocks: int = Field(_FAKE.num_blocks, ge=1, le=1 << 24, description="Fake runner: blocks of the KV cache")
    fake_nan_token: int | None = Field(
        _FAKE.nan_token, ge=0, description="Fake runner: a row that would sample this token id reports logits that are not finite"
    )

    @field_validator("*", mode="before")
    @classmethod
    def _no_bool_for_a_number(cls, value: object, info: ValidationInfo) -> object:
        """Refuse true and false for a number. YAML reads `port: yes` as true, and pydantic would accept true as 1."""
        if value is False and info.field_name == "generation_config":
            return "off"  # YAML reads `off` as false
        if isinstance(value, bool) and not _is_bool(info.field_name or ""):
            raise ValueError("a truth value")
        return value

    @property
    def model_name(self) -> str:
        """Return the name that API clients use for the model."""
        return self.served_model_name or (Path(self.model).resolve().name if self.model else bundled.NAME)

    def engine_config(self) -> EngineConfig:
        if self.model is None:
            raise ConfigError("model is not set: name a checkpoint folder", param="model")
        return EngineConfig(
            model=self.model,
            device=self.device,
            dtype=self.dtype,
            load_format=self.load_format,
            runner=self.runner,
            max_model_len=self.max_model_len,
            seed=self.seed,
            overlap=self.overlap,
            cuda_graphs=self.cuda_graphs,
            kernel_folder=self.kernel_folder,
            startup_budget_s=self.startup_budget_s,
            debug_checks=self.debug_checks,
            cache=CacheConfig(
                block_size=self.block_size,
                num_blocks=self.num_blocks,
                memory_fraction=self.memory_fraction,
                host_bytes=self.host_bytes,
                prefix_caching=self.prefix_caching,
            ),
            scheduler=SchedulerConfig(
                max_num_seqs=self.max_num_seqs,
                max_step_tokens=self.max_step_tokens,
                max_queue=self.max_queue,
                max_skips=self.max_skips,
            ),
            fake=FakeConfig(
                step_ms=self.fake_step_ms,
                token_us=self.fake_token_us,
                num_blocks=self.fake_num_blocks,
                nan_token=self.fake_nan_token,
            ),
        )


def load_settings(flags: Mapping[str, object] | None = None, *, config: str | Path | None = None) -> Settings:
    """Merge flags, environment, YAML file and defaults into a Settings. `flags` maps field names to the given values. `config` is
    the path of the YAML file. Raises ConfigError."""
    flags = dict(flags or {})
    unknown = [name for name in os.environ if name.upper().startswith(PREFIX) and not _known_variable(name.upper())]
    if unknown:
        raise ConfigError("\n".join(_unknown_variable(name) for name in sorted(unknown)), param=unknown[0])
    path = config or os.environ.get(CONFIG_VARIABLE) or None
    layers = [
        ({name: flag(name) for name in flags}, flags),
        _environment(),
        _file(Path(path)) if path else ({}, {}),
    ]
    origins: dict[str, str] = {}
    values: dict[str, Any] = {}
    for names, layer in reversed(layers):
        origins |= names
        values |= layer
    try:
        settings = Settings(**values)
    except ValidationError as error:
        problems = error.errors()
        lines = [_explain(problem, origins) for problem in problems]
        raise ConfigError("\n".join(dict.fromkeys(lines)), param=str(problems[0]["loc"][0])) from None
    _check_together(settings, origins)
    return settings


def in_settings_names(message: str) -> str:
    """Replace the engine's names of settings in `message` with the operator's: `cache.block_size` becomes `block_size`."""

    def as_set(found: re.Match[str]) -> str:
        group, _, name = found[0].partition(".")
        return _ENGINE_PREFIX[group] + name

    return _ENGINE_NAME.sub(as_set, message)


def describe(name: str) -> str:
    """Return in words which values the setting `name` may have, such as "a whole number from 0 to 65535"."""
    kinds = _kinds(name)
    return " or ".join(_in_words(kind) for kind in kinds if kind.get("type") != "null")


def flag(name: str) -> str:
    """Return the command-line flag of the setting `name`: "--max-n" for "max_n"."""
    return "--" + name.replace("_", "-")


_SCHEMA: dict[str, Any] = Settings.model_json_schema()["properties"]


def _kinds(name: str) -> list[dict[str, Any]]:
    schema = _SCHEMA[name]
    kinds: list[dict[str, Any]] = schema.get("anyOf", [schema])
    return kinds


def _is_bool(name: str) -> bool:
    return any(kind.get("type") == "boolean" for kind in _kinds(name))


def _check_together(settings: Settings, origins: Mapping[str, str]) -> None:
    """Raise ConfigError if two ports are equal or max_step_tokens is below max_num_seqs."""
    ports = {name: getattr(settings, name) for name in ("port", "grpc_port", "admin_port")}
    for (one, port), (other, same) in itertools.combinations(ports.items(), 2):
        if port and port == same:
            raise ConfigError(f"{one} and {other} are both {port}: each needs a port of its own", param=other)
    tokens, seqs = settings.max_step_tokens, settings.max_num_seqs
    if tokens is not None and tokens < seqs:
        origin = origins.get("max_step_tokens", "the call")
        raise ConfigError(
            f"max_step_tokens is {tokens} (from {origin}): it must be at least max_num_seqs, which is {seqs}",
            param="max_step_tokens",
        )


def _in_words(kind: dict[str, Any]) -> str:
    if "enum" in kind:
        return "one of " + ", ".join(kind["enum"])
    if kind["type"] == "boolean":
        return "true or false"
    if kind["type"] == "array":
        return str(kind["items"]["description"])
    if kind["type"] == "string":
        return "a text that is not empty"
    low, high = kind.get("minimum"), kind.get("maximum")
    words = "a whole number" if kind["type"] == "integer" else "a number"
    if "exclusiveMinimum" in kind:
        words += f" greater than {kind['exclusiveMinimum']:g}" + (f" and at most {high:g}" if high is not None else "")
    elif low is not None and high is not None:
        words += f" from {low} to {high}"
    elif low is not None:
        words += f", {low} or more"
    return words


def _environment() -> tuple[dict[str, str], dict[str, Any]]:
    values = EnvSettingsSource(Settings)()
    return {name: PREFIX + name.upper() for name in values}, values


def _file(path: Path) -> tuple[dict[str, str], dict[str, Any]]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"config is {str(path)!r}, which cannot be read: {error}", param="config") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {error}", param="config") from None
    if values is None:
        return {}, {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds a {type(values).__name__}: it must hold lines of the form `key: value`", param="config")
    return {str(name): str(path) for name in values}, {str(name): value for name, value in values.items()}


def _known_variable(name: str) -> bool:
    return name == CONFIG_VARIABLE or name.removeprefix(PREFIX).lower() in Settings.model_fields


def _unknown_variable(name: str) -> str:
    key = name[len(PREFIX) :].lower()
    return f"{name} is set in the environment, but there is no such setting{_closest(key)}{_service_links(os.environ[name])}"


def _closest(name: str) -> str:
    near = difflib.get_close_matches(name.lower().replace("-", "_"), Settings.model_fields, n=1)
    return f": did you mean {near[0]!r}?" if near else ""


def _service_links(value: object) -> str:
    """Return a hint for an error message if `value` begins with tcp://, else "". Kubernetes sets variables such as
    TIDEGATE_PORT=tcp://... in each pod for a Service named tidegate."""
    if not str(value).startswith("tcp://"):
        return ""
    return " (Kubernetes sets such variables for a Service named tidegate: set enableServiceLinks: false in the pod's spec)"


def _explain(problem: ErrorDetails, origins: Mapping[str, str]) -> str:
    name = str(problem["loc"][0])
    origin = origins.get(name, "the call")
    if name not in Settings.model_fields:
        return f"{name} is set in {origin}, but there is no such setting" + _closest(name)
    value = problem["input"]
    shown = "empty" if value is None else repr(value)
    return f"{name} is {shown} (from {origin}): it must be {describe(name)}" + _service_links(value)
