"""Tests a real `tidegate serve` whose standard error nobody reads."""

import contextlib
import json
import os
import socket
import subprocess
import threading
import urllib.error
import urllib.request

import pytest

from tests.support.children import ROOT, ServerChild, wait_until


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return taken.getsockname()[1]


class UnreadServer(ServerChild):
    """Runs a server whose standard error is a pipe that is full from the start, so the first log line cannot be written."""

    def __init__(self, **settings):
        self.port, self.grpc_port = free_port(), free_port()
        port, grpc_port = self.port, self.grpc_port
        super().__init__(port=port, grpc_port=grpc_port, **settings)
        self.port, self.grpc_port = port, grpc_port
        self.log, self._write_end = os.pipe()
        self._fill()

    def _fill(self):
        os.set_blocking(self._write_end, False)
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(self._write_end, b"\n")
        os.set_blocking(self._write_end, True)

    def start(self):
        command = [os.sys.executable, "-m", "server.cli", "serve"]
        self.process = subprocess.Popen(command, cwd=ROOT, env=self._environment, stderr=self._write_end)
        os.close(self._write_end)

    def wait_ready(self, seconds=40.0):
        wait_until(lambda: self.pid_gone or self.is_ready(), "the server is ready", seconds=seconds)
        assert not self.pid_gone

    def is_ready(self):
        try:
            return self.get("/health/ready").status == 200
        except (urllib.error.URLError, OSError):
            return False

    def get(self, path, body=None):
        request = urllib.request.Request(self.url + path, body, {"content-type": "application/json"})
        return urllib.request.urlopen(request, timeout=10)

    def read_log(self):
        """Read the server's log from the pipe until the last process has closed the pipe. JSON lines are added to
        `self.lines`."""
        with open(self.log, encoding="utf-8") as log:
            for line in log:
                if line.startswith("{"):
                    self.lines.append(json.loads(line))


@pytest.fixture
def unread():
    with UnreadServer() as server:
        yield server


def generate(server):
    body = json.dumps({"prompt": "a", "max_tokens": 4}).encode()
    return json.load(server.get("/v1/generate", body))["usage"]["completion_tokens"]


def test_a_server_whose_log_nobody_reads_serves_and_loses_no_line(unread):
    assert generate(unread) == 4
    reader = threading.Thread(target=unread.read_log)
    reader.start()
    wait_until(lambda: unread.said("ready") and unread.said("engine ready"), "the log says what happened meanwhile")
    unread.process.terminate()
    assert unread.process.wait(30) == 0
    reader.join(20)
    assert unread.said("stopped")


def test_sigterm_ends_a_server_whose_log_nobody_reads(unread):
    assert generate(unread) == 4
    children = unread.children()
    unread.process.terminate()
    assert unread.process.wait(30) == 0
    assert not [pid for pid in children.values() if os.path.exists(f"/proc/{pid}")]
    os.close(unread.log)
