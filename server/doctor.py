"""Implements `tidegate doctor`, which checks whether this machine can serve with the given settings, and says what is missing.

The checks run the same code as `serve`. Only checks that would have to read the weights are left out.
"""

from __future__ import annotations

import errno
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import msgspec

from engine.config import ModelLimits, check
from engine.errors import CheckpointError, ConfigError
from engine.models.families import read_spec
from engine.models.generation import GenerationDefaults, read_generation_defaults
from server.bundled import bundled_checkpoint
from server.doctor_tiers import tiers
from server.findings import Finding, State
from server.settings import Settings
from server.settings_sources import in_settings_names
from server.text.tokenizer import Tokenizer

NEEDED = ("torch", "safetensors", "tokenizers", "msgspec", "zmq", "fastapi", "uvicorn", "uvloop", "grpc", "prometheus_client")
OPTIONAL = {"triton": "faster kernels on a CUDA device"}  # name of an optional package -> its purpose
LOW_DISK_BYTES = 1 << 30  # the report has a note if the disk has less free space than this
TORCH_SECONDS = 120  # time that the probe process has to import torch and to print its answer


class TorchDevice(msgspec.Struct, frozen=True):
    name: str
    bytes: int
    capability: str


class TorchAnswer(msgspec.Struct, frozen=True):
    """The JSON that `engine.weights.probe` prints. The probe runs in another process, since the server must not import torch."""

    version: str
    cuda: str | None  # the CUDA version that torch was built for
    devices: list[TorchDevice]
    problem: str | None  # what is wrong with the checkpoint or the engine's settings; None if both are right


class Checkpoint(NamedTuple):
    """Holds what could be read from the model's folder. `limits` is None if the model cannot be served."""

    findings: list[Finding]
    settings: Settings  # with the folder of the bundled model if no model was named
    limits: ModelLimits | None


def examine(settings: Settings) -> list[Finding]:
    """Check the machine, the model and the settings. Returns the findings in the order of the report."""
    checkpoint = _model(settings)
    answer = _run_probe(checkpoint)
    return [
        _python(),
        *_packages(),
        *([answer] if isinstance(answer, Finding) else _torch(settings, answer)),
        _memory(settings, has_cuda=isinstance(answer, TorchAnswer) and bool(answer.devices)),
        _disk(),
        *checkpoint.findings,
        *_engine(checkpoint, answer),
        *_tiers(checkpoint, answer),
        _port("HTTP port", settings.host, settings.port),
        _port("gRPC port", settings.host, settings.grpc_port),
        _port("admin port", settings.admin_host, settings.admin_port),
        *_optional(),
    ]


def _python() -> Finding:
    good = (3, 11) <= sys.version_info < (3, 13)
    text = f"{platform.python_version()} on {platform.platform(terse=True)}, {os.cpu_count()} CPUs"
    return Finding("Python", "ok" if good else "missing", text if good else f"{text}: Tidegate needs 3.11 or 3.12")


def _packages() -> list[Finding]:
    absent = [name for name in NEEDED if not _has(name)]
    if absent:
        return [Finding("packages", "missing", f"{', '.join(absent)}: install Tidegate with `make serve`")]
    return [Finding("packages", "ok", "all required packages are installed")]


def _run_probe(checkpoint: Checkpoint) -> TorchAnswer | Finding:
    command = [sys.executable, "-m", "engine.weights.probe", _question(checkpoint)]
    try:
        probe = subprocess.run(command, capture_output=True, timeout=TORCH_SECONDS, check=True)
        return msgspec.json.decode(probe.stdout, type=TorchAnswer)
    except subprocess.CalledProcessError as error:
        lines = error.stderr.decode(errors="replace").strip().splitlines()
        return Finding("torch", "missing", f"cannot be used: {lines[-1] if lines else error}")
    except (subprocess.TimeoutExpired, msgspec.MsgspecError) as error:
        return Finding("torch", "missing", f"does not answer: {error}")


def _question(checkpoint: Checkpoint) -> str:
    """Return the engine's config as JSON for `engine.weights.probe` to check. It is empty if the model cannot be served or the
    runner is fake."""
    if checkpoint.limits is None or checkpoint.settings.runner == "fake":
        return ""
    return msgspec.json.encode(checkpoint.settings.engine_config()).decode()


def _torch(settings: Settings, answer: TorchAnswer) -> list[Finding]:
    built = f"built for CUDA {answer.cuda}" if answer.cuda else "built without CUDA"
    devices = [
        Finding(f"CUDA device {i}", "ok", f"{d.name}, {_gib(d.bytes)}, compute capability {d.capability}")
        for i, d in enumerate(answer.devices)
    ]
    state: State = "missing" if settings.device == "cuda" else "note"
    why = "torch finds no device: check that a driver is installed and works" if answer.cuda else "torch was built without CUDA"
    return [Finding("torch", "ok", f"{answer.version}, {built}"), *(devices or [Finding("CUDA", state, f"none: {why}")])]


def _engine(checkpoint: Checkpoint, answer: TorchAnswer | Finding) -> list[Finding]:
    """Check the engine's settings, its memory and the checkpoint's files by the same code that the engine runs when it starts."""
    if checkpoint.limits is None:
        return []
    if isinstance(answer, TorchAnswer) and answer.problem is not None:
        return [Finding("engine", "missing", in_settings_names(answer.problem))]
    settings = checkpoint.settings
    try:
        # A missing CUDA device is reported as another finding, so this check assumes that there is one.
        check(settings.engine_config(), checkpoint.limits, has_cuda=True)
    except ConfigError as error:
        return [Finding("engine", "missing", in_settings_names(error.message))]
    if settings.runner == "fake" or isinstance(answer, Finding):
        why = "runner is fake" if settings.runner == "fake" else "that needs torch"
        return [Finding("engine", "note", f"the settings fit the model; its weights are not checked: {why}")]
    weights = "are random, as load_format is dummy" if settings.load_format == "dummy" else "have the right names and shapes"
    return [Finding("engine", "ok", f"the settings fit the model; its weights {weights}")]


def _tiers(checkpoint: Checkpoint, answer: TorchAnswer | Finding) -> list[Finding]:
    """Measure the tiers of the KV cache. There is nothing to measure with if the engine would not start."""
    if checkpoint.limits is None or (isinstance(answer, TorchAnswer) and answer.problem is not None):
        return []
    return tiers(checkpoint.settings.engine_config(), has_torch=isinstance(answer, TorchAnswer))


def _memory(settings: Settings, *, has_cuda: bool) -> Finding:
    size = os.sysconf("SC_PAGE_SIZE")
    total, free = os.sysconf("SC_PHYS_PAGES") * size, os.sysconf("SC_AVPHYS_PAGES") * size
    text = f"{_gib(total)}, {_gib(free)} free"
    on_host = settings.device == "cpu" or (settings.device == "auto" and not has_cuda)
    if on_host and settings.num_blocks is None and settings.host_bytes > total:
        cache = _gib(settings.host_bytes)
        return Finding("memory", "note", f"{text}: less than host_bytes, the size of the KV cache, {cache}; set a smaller one")
    return Finding("memory", "ok", text)


def _disk() -> Finding:
    folder = Path.home()
    free = shutil.disk_usage(folder).free
    return Finding("disk", "ok" if free > LOW_DISK_BYTES else "note", f"{_gib(free)} free at {folder}")


def _model(settings: Settings) -> Checkpoint:
    try:
        is_bundled, folder = settings.model is None, settings.model or str(bundled_checkpoint())
        settings = settings.model_copy(update={"model": folder})
        spec = read_spec(folder)
        text = Tokenizer.from_folder(folder)
        defaults = read_generation_defaults(folder) if settings.generation_config == "auto" else GenerationDefaults()
    except (ConfigError, CheckpointError) as error:
        return Checkpoint([Finding("model", "missing", error.message)], settings, None)
    if is_bundled:
        found = [Finding("model", "note", f"none is set: the bundled model Tidepool at {folder} will be served")]
    else:
        what = f"{spec.architecture}, {spec.num_layers} layers, context {spec.max_model_len}, at {folder}"
        found = [Finding("model", "ok", what)]
    found += [Finding("config.json", "note", note) for note in spec.notes]
    found += [
        Finding("chat template", "note", f"{problem}: /v1/chat/completions refuses what needs it")
        for problem in text.chat.problems
    ]
    if defaults.not_honoured:
        keys = ", ".join(defaults.not_honoured)
        found.append(Finding("sampling", "note", f"generation_config.json has keys that change nothing here: {keys}"))
    return Checkpoint(found, settings, spec.limits())


def _port(what: str, host: str, port: int) -> Finding:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        with socket.socket(family, kind, protocol) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(address)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            return Finding(what, "missing", f"{host}:{port} is in use by another program, or by a Tidegate that runs already")
        return Finding(what, "missing", f"{host}:{port} cannot be bound: {error.strerror}")
    return Finding(what, "ok", f"{host}:{port} is free" if port else f"{host}: the system will choose a free one")


def _optional() -> list[Finding]:
    return [
        Finding(name, "ok" if _has(name) else "note", f"{_version(name)}{purpose}" if _has(name) else f"not installed: {purpose}")
        for name, purpose in OPTIONAL.items()
    ]


def _has(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # find_spec raises it if the parent package of a dotted name is missing
        return False


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name) + ": "
    except importlib.metadata.PackageNotFoundError:
        return ""


def _gib(size: int) -> str:
    return f"{size / (1 << 30):.1f} GiB"
