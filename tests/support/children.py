"""Runs real processes that tests may kill or stop: one engine process, or a whole `tidegate serve`."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec
import psutil

from engine.config import EngineConfig
from engine.process import EngineStart

ROOT = Path(__file__).resolve().parents[2]


def wait_until(condition: Callable[[], object], what: str, *, seconds: float = 20.0) -> None:
    """Wait until `condition()` is true. Raises AssertionError, with `what` in the message, after `seconds`."""
    until = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > until:
            raise AssertionError(f"waited {seconds:g} s in vain: {what}")
        time.sleep(0.02)


def after(shell: str, command: list[str]) -> list[str]:
    """Return a command that runs the shell code `shell` and then, in the same process, `command`."""
    return ["sh", "-c", f'{shell}; exec "$@"', "sh", *command]


class EngineChild:
    """Runs one engine process with a socket of its own. After the process has died, `start` starts a new process at the same
    socket."""

    def __init__(self, config: EngineConfig) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="tidegate-test-")
        self.endpoint = f"ipc://{self._folder.name}/engine"
        self.log = Path(self._folder.name) / "log"
        self._config = config
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> EngineChild:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.kill()
        self._folder.cleanup()

    def start(self, config: EngineConfig | None = None) -> None:
        """Start an engine process. `config` replaces the settings of this process, for an engine that restarts with other
        ones."""
        start = EngineStart(config=config or self._config, endpoint=self.endpoint, log_level="debug", log_format="json")
        with self.log.open("ab") as log:
            command = [sys.executable, "-m", "engine.process"]
            self.process = subprocess.Popen(
                command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=log, start_new_session=True
            )
        assert self.process.stdin is not None
        self.process.stdin.write(msgspec.json.encode(start) + b"\n")
        self.process.stdin.flush()

    def send(self, number: int) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def wait(self, seconds: float = 20.0) -> int:
        assert self.process is not None
        return self.process.wait(seconds)

    def kill(self) -> None:
        if self.process is None:
            return
        self.process.kill()
        self.process.wait()
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process = None


class ServerChild:
    """Runs a `tidegate serve` on free ports with a fake engine. `settings` become TIDEGATE_* variables of the server's
    environment.

    `shell` is shell code that runs first in the server's process, for example "ulimit -n 20". `python` is the server's Python
    interpreter.
    """

    def __init__(self, *, shell: str = ":", python: str = sys.executable, **settings: object) -> None:
        self._command = after(shell, [python, "-m", "server.cli", "serve"])
        given = {
            "port": 0,
            "grpc_port": 0,
            "admin_port": 0,
            "runner": "fake",
            "fake_step_ms": 5,
            "log_format": "json",
            **settings,
        }
        self._environment = {k: v for k, v in os.environ.items() if not k.startswith("TIDEGATE_")}
        self._environment |= {f"TIDEGATE_{key.upper()}": str(value) for key, value in given.items()}
        # The folder is the server's TMPDIR. The server should leave it empty.
        self.folder = tempfile.TemporaryDirectory(prefix="tidegate-test-")
        self._environment["TMPDIR"] = self.folder.name
        self.lines: list[dict[str, Any]] = []
        self.text: list[str] = []
        self.port = self.grpc_port = self.admin_port = 0
        self.process: subprocess.Popen[str] | None = None

    def __enter__(self) -> ServerChild:
        with contextlib.ExitStack() as stack:
            stack.callback(self.stop)  # a server that does not get ready leaves no process and no folder
            self.start()
            self.wait_ready()
            stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.stop()
        if kind is not None:
            sys.stderr.write("".join(self.text[-100:]))

    def start(self) -> None:
        self.process = subprocess.Popen(
            self._command, cwd=ROOT, env=self._environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
        )
        threading.Thread(target=self._read_log, args=(self.process,), daemon=True).start()

    def wait_ready(self, seconds: float = 40.0) -> None:
        wait_until(lambda: self.said("ready") or self.pid_gone, "the server is ready", seconds=seconds)
        ready = self.said("ready")
        assert ready, "the server ended:\n" + "".join(self.text)
        self.port, self.grpc_port, self.admin_port = (ready[0][f"{name}_port"] for name in ("http", "grpc", "admin"))

    def stop(self) -> None:
        if self.process is not None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(15)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self.folder.cleanup()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    @property
    def pid_gone(self) -> bool:
        return self.process is None or self.process.poll() is not None

    def said(self, message: str) -> list[dict[str, Any]]:
        return [line for line in list(self.lines) if line.get("message") == message]

    def children(self) -> dict[str, int]:
        """Return the process ids of the server's children by title, such as {"tidegate: engine 0": 123}."""
        titles = {}
        for child in psutil.Process(self.pid).children():
            with contextlib.suppress(psutil.Error):  # raised if the child has just died
                titles[" ".join(child.cmdline()).strip()] = child.pid
        return titles

    def _read_log(self, process: subprocess.Popen[str]) -> None:
        assert process.stderr is not None
        with process.stderr:
            for line in process.stderr:
                self.text.append(line)
                if line.startswith("{"):
                    self.lines.append(json.loads(line))
