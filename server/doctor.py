"""`tidegate doctor`: what this machine can run, and why not the rest."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Literal, NamedTuple

import msgspec
from rich.console import Console
from rich.table import Table

from engine.errors import ConfigError
from server.demo import ensure_demo_checkpoint
from server.settings import Settings

State = Literal["ok", "missing", "note"]  # "missing": the server cannot run as it is set up

NEEDED = ("torch", "safetensors", "tokenizers", "msgspec", "zmq", "fastapi", "uvicorn", "uvloop", "grpc", "prometheus_client")
OPTIONAL = {
    "triton": "faster kernels on a CUDA device",
    "flashinfer": "faster attention on a CUDA device",
    "onnxruntime": "the ONNX backend",
    "tensorrt": "the TensorRT backend",
    "opentelemetry.sdk": "tracing",
}
LOW_DISK_BYTES = 1 << 30
TORCH_SECONDS = 120

# In a process of its own: importing torch takes seconds, and a broken CUDA installation can end the process.
_ASK_TORCH = """
import json, torch
devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
print(json.dumps({"version": torch.__version__, "cuda": torch.version.cuda,
    "devices": [{"name": d.name, "bytes": d.total_memory, "capability": f"{d.major}.{d.minor}"} for d in devices]}))
"""


class Finding(NamedTuple):
    what: str
    state: State
    text: str


class TorchDevice(msgspec.Struct, frozen=True):
    name: str
    bytes: int
    capability: str


class TorchAnswer(msgspec.Struct, frozen=True):
    version: str
    cuda: str | None
    devices: list[TorchDevice]


def examine(settings: Settings) -> list[Finding]:
    return [
        _python(),
        *_packages(),
        *_torch(settings),
        _memory(),
        _disk(),
        _model(settings),
        _port("HTTP port", settings.host, settings.port),
        _port("gRPC port", settings.host, settings.grpc_port),
        *_optional(),
    ]


def report(findings: list[Finding]) -> int:
    """Print a table; returns the exit code."""
    table = Table(box=None, show_header=False, pad_edge=False)
    marks = {"ok": "[green]ok[/]", "missing": "[red]MISSING[/]", "note": "[yellow]-[/]"}
    for finding in findings:
        table.add_row(marks[finding.state], finding.what, finding.text)
    Console().print(table)
    return int(any(finding.state == "missing" for finding in findings))


def _python() -> Finding:
    good = (3, 11) <= sys.version_info < (3, 13)
    text = f"{platform.python_version()} on {platform.platform(terse=True)}, {os.cpu_count()} CPUs"
    return Finding("Python", "ok" if good else "missing", text if good else f"{text}: Tidegate needs 3.11 or 3.12")


def _packages() -> list[Finding]:
    absent = [name for name in NEEDED if not _has(name)]
    if absent:
        return [Finding("packages", "missing", f"{', '.join(absent)}: install Tidegate with `make serve`")]
    return [Finding("packages", "ok", "all that are needed are installed")]


def _torch(settings: Settings) -> list[Finding]:
    try:
        asked = subprocess.run([sys.executable, "-c", _ASK_TORCH], capture_output=True, timeout=TORCH_SECONDS, check=True)
        answer = msgspec.json.decode(asked.stdout, type=TorchAnswer)
    except subprocess.CalledProcessError as error:
        lines = error.stderr.decode(errors="replace").strip().splitlines()
        return [Finding("torch", "missing", f"cannot be imported: {lines[-1] if lines else error}")]
    except (subprocess.TimeoutExpired, msgspec.MsgspecError) as error:
        return [Finding("torch", "missing", f"gives no answer: {error}")]
    built = f"built for CUDA {answer.cuda}" if answer.cuda else "built without CUDA"
    devices = [
        Finding(f"CUDA device {i}", "ok", f"{d.name}, {_gib(d.bytes)}, compute capability {d.capability}")
        for i, d in enumerate(answer.devices)
    ]
    state: State = "missing" if settings.device == "cuda" else "note"
    why = "torch was built without CUDA" if not answer.cuda else "torch sees no device: is there one, with a driver that works?"
    return [Finding("torch", "ok", f"{answer.version}, {built}"), *(devices or [Finding("CUDA", state, f"none: {why}")])]


def _memory() -> Finding:
    pages, free = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_AVPHYS_PAGES")
    size = os.sysconf("SC_PAGE_SIZE")
    return Finding("memory", "ok", f"{_gib(pages * size)}, of it free {_gib(free * size)}")


def _disk() -> Finding:
    folder = Path.home()
    free = shutil.disk_usage(folder).free
    return Finding("disk", "ok" if free > LOW_DISK_BYTES else "note", f"{_gib(free)} free at {folder}")


def _model(settings: Settings) -> Finding:
    if settings.model is not None:
        if (Path(settings.model) / "config.json").is_file():
            return Finding("model", "ok", settings.model)
        return Finding("model", "missing", f"{settings.model} is no checkpoint folder: there is no config.json in it")
    try:
        return Finding("model", "note", f"none is set: the random demo model at {ensure_demo_checkpoint()} would be served")
    except ConfigError as error:
        return Finding("model", "missing", error.message)


def _port(what: str, host: str, port: int) -> Finding:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        with socket.socket(family, kind, protocol) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(address)
    except OSError as error:
        return Finding(what, "missing", f"{host}:{port} cannot be had: {error.strerror}")
    return Finding(what, "ok", f"{host}:{port} is free")


def _optional() -> list[Finding]:
    return [
        Finding(name, "ok" if _has(name) else "note", f"{_version(name)}{purpose}" if _has(name) else f"not installed: {purpose}")
        for name, purpose in OPTIONAL.items()
    ]


def _has(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # the parent of a dotted name
        return False


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name) + ": "
    except importlib.metadata.PackageNotFoundError:
        return ""


def _gib(size: int) -> str:
    return f"{size / (1 << 30):.1f} GiB"
