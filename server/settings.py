"""What an operator can set, from four places: flags > TIDEGATE_* environment > YAML file > the defaults below.

`Settings` is the only list of settings: the flags of `tidegate serve`, the variables and the YAML keys are made from its
fields. It is frozen and travels to the workers as JSON. `load_settings` is the way in, and raises ConfigError only.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError, ValidationInfo, field_validator
from pydantic_core import ErrorDetails
from pydantic_settings import BaseSettings, EnvSettingsSource, SettingsConfigDict

from engine.config import CacheConfig, Device, DType, EngineConfig, FakeConfig, LoadFormat, RunnerKind, SchedulerConfig
from engine.errors import ConfigError
from server import bundled

PREFIX = "TIDEGATE_"
CONFIG_VARIABLE = "TIDEGATE_CONFIG"  # the YAML file's path; `--config` wins over it

_CACHE, _SCHEDULER, _FAKE = CacheConfig(), SchedulerConfig(), FakeConfig()
_ENGINE_PREFIX = {"cache": "", "scheduler": "", "fake": "fake_"}  # a group of EngineConfig -> how the names of its settings begin
_GROUPED = {f"{group}.{name}" for group in _ENGINE_PREFIX for name in getattr(EngineConfig(model=""), group).__struct_fields__}
_ENGINE_NAME = re.compile(rf"\b({'|'.join(map(re.escape, sorted(_GROUPED)))})\b")


class Settings(BaseSettings):
    """Everything that can be set. `Settings(port=0)` reads the environment too, but no file. An empty variable is unset."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, env_ignore_empty=True, frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=()
    )

    # What is served, and where. The loopback address is the default since keys are off by default: whoever can reach the
    # port can use the accelerator. In a container, set 0.0.0.0.
    model: str | None = Field(None, min_length=1, description="Checkpoint folder; without one, the bundled model Tidepool")
    served_model_name: str | None = Field(None, min_length=1, description="Name in the API; by default the folder's")
    host: str = Field("127.0.0.1", min_length=1, description="Address to listen on; 0.0.0.0 or :: for every interface")
    port: int = Field(8000, ge=0, le=65535, description="HTTP port; 0 picks a free one")
    grpc_port: int = Field(9000, ge=0, le=65535, description="gRPC port; 0 picks a free one")
    api_workers: int = Field(1, ge=1, le=256, description="Processes that serve HTTP and gRPC")

    # Limits on what a client may send, and how slowly.
    max_body_bytes: int = Field(4 << 20, ge=1024, le=1 << 30, description="Largest request body (HTTP) or message (gRPC)")
    max_header_bytes: int = Field(32 << 10, ge=1024, le=1 << 20, description="Largest request line and headers together")
    header_timeout_s: float = Field(10, gt=0, description="Seconds for a request's headers to arrive")
    body_timeout_s: float = Field(30, gt=0, description="Seconds for a request's body to arrive")
    idle_timeout_s: float = Field(75, gt=0, description="Seconds a connection may stay open between requests")
    send_timeout_s: float = Field(60, gt=0, description="Seconds a client may read nothing before its stream is ended")
    max_waiting_text_bytes: int = Field(
        64 << 20, ge=1 << 20, description="Bytes of long texts that may wait for one worker's tokenizer; more are refused"
    )
    max_n: int = Field(16, ge=1, le=128, description="Most outputs of one request")
    max_stop_strings: int = Field(16, ge=0, le=1024, description="Most stop strings of one request")
    max_stop_len: int = Field(256, ge=1, le=65536, description="Longest stop string, in characters")
    max_logprobs: int = Field(1 << 22, ge=0, description="Most log-probabilities of one answer, alternatives counted")
    max_prompt_logprobs: int = Field(1 << 17, ge=0, description="Most of them for prompts, which come all at once")

    # Starting, failing and stopping.
    drain_timeout_s: float = Field(30, ge=0, description="Seconds that running requests have to finish after SIGTERM")
    stall_timeout_s: float = Field(
        30, gt=0, description="Seconds without a step ended, with work to do, until an engine is replaced"
    )
    resume_timeout_s: float = Field(120, gt=0, description="Seconds that streams wait for a dead engine's successor")
    max_deaths: int = Field(3, ge=1, description="Engine deaths that a request may be part of before it is ended")
    crash_limit: int = Field(5, ge=1, description="Deaths of one process within crash_window_s that end the server")
    crash_window_s: float = Field(60, gt=0, description="See crash_limit")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least important log line shown")
    log_format: Literal["auto", "human", "json"] = Field("auto", description="auto: human at a terminal, JSON otherwise")

    # The engine: see engine/config.py. A default of None means "choose for me".
    device: Device = Field("auto", description="Where to run")
    dtype: DType = Field("auto", description="Number format of weights and activations")
    load_format: LoadFormat = Field("safetensors", description="dummy: random weights of the right shapes")
    runner: RunnerKind = Field("torch", description="fake: no model, made-up tokens, for load tests")
    max_model_len: int | None = Field(None, ge=1, description="Longest prompt and output together; by default the model's")
    seed: int = Field(0, ge=0, description="Seeds dummy weights")
    overlap: bool | None = Field(None, description="Submit a step before the last one's tokens are read")
    cuda_graphs: bool | None = Field(None, description="Replay captured decode steps on CUDA")
    debug_checks: bool = Field(False, description="Check every invariant after each step")
    block_size: int = Field(_CACHE.block_size, ge=1, description="Tokens in a KV-cache block")
    num_blocks: int | None = Field(_CACHE.num_blocks, ge=1, description="KV-cache blocks; wins over memory_fraction")
    memory_fraction: float = Field(_CACHE.memory_fraction, gt=0, le=1, description="Share of free device memory for KV")
    host_bytes: int = Field(_CACHE.host_bytes, ge=1, description="KV-cache bytes where the device is the CPU")
    prefix_caching: bool = Field(_CACHE.prefix_caching, description="Share KV blocks of equal prompt prefixes")
    max_num_seqs: int = Field(_SCHEDULER.max_num_seqs, ge=1, description="Most requests running at once")
    max_step_tokens: int | None = Field(_SCHEDULER.max_step_tokens, ge=1, description="Most tokens in one step")
    max_queue: int = Field(_SCHEDULER.max_queue, ge=1, description="Most requests waiting; further ones are refused")
    max_skips: int = Field(_SCHEDULER.max_skips, ge=0, description="Times a request that does not fit may be passed")
    fake_step_ms: float = Field(_FAKE.step_ms, ge=0, description="runner fake: milliseconds a step takes")
    fake_token_us: float = Field(_FAKE.token_us, ge=0, description="runner fake: microseconds more for each token")
    fake_num_blocks: int = Field(_FAKE.num_blocks, ge=1, description="runner fake: KV-cache blocks")

    @field_validator("*", mode="before")
    @classmethod
    def _no_bool_for_a_number(cls, value: object, info: ValidationInfo) -> object:
        """YAML reads `port: yes` as true, which pydantic would take for 1."""
        if isinstance(value, bool) and not _is_bool(info.field_name or ""):
            raise ValueError("a truth value")
        return value

    @property
    def model_name(self) -> str:
        """The model's name in the API."""
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
            fake=FakeConfig(step_ms=self.fake_step_ms, token_us=self.fake_token_us, num_blocks=self.fake_num_blocks),
        )


def load_settings(flags: Mapping[str, object] | None = None, *, config: str | Path | None = None) -> Settings:
    """Merge the four places. `flags` holds the flags that were given, by field name; `config` is the YAML file's path."""
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
    """An engine's message with the names that an operator sets: `cache.block_size` is `block_size` here."""

    def as_set(found: re.Match[str]) -> str:
        group, _, name = found[0].partition(".")
        return _ENGINE_PREFIX[group] + name

    return _ENGINE_NAME.sub(as_set, message)


def describe(name: str) -> str:
    """What is right for a field, in words: "a whole number from 0 to 65535"."""
    kinds = _kinds(name)
    return " or ".join(_in_words(kind) for kind in kinds if kind.get("type") != "null")


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


_SCHEMA: dict[str, Any] = Settings.model_json_schema()["properties"]


def _kinds(name: str) -> list[dict[str, Any]]:
    schema = _SCHEMA[name]
    kinds: list[dict[str, Any]] = schema.get("anyOf", [schema])
    return kinds


def _is_bool(name: str) -> bool:
    return any(kind.get("type") == "boolean" for kind in _kinds(name))


def _check_together(settings: Settings, origins: Mapping[str, str]) -> None:
    """What each value by itself cannot show."""
    if settings.port and settings.port == settings.grpc_port:
        raise ConfigError(
            f"port and grpc_port are both {settings.port}: HTTP and gRPC each need a port of their own", param="grpc_port"
        )
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
    """Kubernetes gives each pod TIDEGATE_PORT=tcp://... when a Service is named tidegate."""
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
