"""Makes the programs that the supervisor starts, the engine's and the workers', each with its first line on standard input."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from engine.process import EngineStart
from server.settings import Settings
from server.supervise.child import Program, Timeout
from server.supervise.folder import RunFolder
from server.supervise.sockets import socket_path
from server.supervise.worker_start import WorkerStart


class Programs:
    """Makes the programs of one server. Before each start, a program makes the server's private folder again if it is missing."""

    def __init__(self, settings: Settings, folder: RunFolder, *, http_fd: int, admin_fd: int) -> None:
        """`settings` must name a model and hold the ports that the two sockets are bound to.

        Raises ConfigError if the path of the engine's socket is too long.
        """
        self._settings = settings
        self._folder = folder
        self._http_fd = http_fd
        self._admin_fd = admin_fd
        self._endpoint = f"ipc://{socket_path(folder.path)}"

    def engine(self) -> Program:
        settings = self._settings
        line = msgspec.json.encode(
            EngineStart(
                config=settings.engine_config(),
                endpoint=self._endpoint,
                log_level=settings.log_level,
                log_format=settings.log_format,
            )
        )

        def start() -> bytes:
            self._folder.restore()
            return line

        return Program("engine 0", "engine.process", start, Timeout("stall_timeout_s", settings.stall_timeout_s))

    def worker(self, index: int, others_serve: Callable[[], bool]) -> Program:
        """Return the program of API worker `index`. At each start it calls `others_serve`: does another worker serve clients?"""

        def start() -> bytes:
            self._folder.restore()
            line = WorkerStart(
                settings=self._settings.model_dump_json(),
                endpoint=self._endpoint,
                http_fd=self._http_fd,
                admin_fd=self._admin_fd,
                index=index,
                listen_at_once=not others_serve(),
            )
            return msgspec.json.encode(line)

        stall = Timeout("worker_stall_timeout_s", self._settings.worker_stall_timeout_s)
        return Program(f"api {index}", "server.supervise.worker", start, stall, fds=(self._http_fd, self._admin_fd))
