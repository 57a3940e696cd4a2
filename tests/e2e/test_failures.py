"""Tests a real `tidegate serve` whose processes hang, die in a row or lack a resource of the host, such as file descriptors."""

import asyncio
import contextlib
import itertools
import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
from pathlib import Path

import grpc
import httpx
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from server import __version__
from server.bundled import bundled_checkpoint
from tests.support import plain_http
from tests.support.children import ROOT, ServerChild, wait_until
from tests.support.serving import body, http, in_thread, refused_start, stream_tokens
from tests.support.tiny_checkpoint import write_tiny_checkpoint

ENGINE = "tidegate: engine 0"
SERVING = health_pb2.HealthCheckResponse.SERVING


def ready(server):
    """Return the answer of /health/ready over a new connection, or None if the connection failed."""
    with contextlib.suppress(httpx.HTTPError):
        return plain_http.get(server.url + "/health/ready", timeout=5)
    return None


def is_ready(server):
    answer = ready(server)
    return answer is not None and answer.status_code == 200


def grpc_status(server, number):
    """Return the gRPC health status over a new connection. A `number` that differs for each call keeps grpc from using an older
    connection again."""
    options = [("grpc.use_local_subchannel_pool", 1), ("tidegate.test", number)]
    with grpc.insecure_channel(f"127.0.0.1:{server.grpc_port}", options=options) as channel:
        return health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=10).status


def generate(server, number=1, max_tokens=5):
    answer = plain_http.post(server.url + "/v1/generate", json=body(number, max_tokens), timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()["outputs"][0]["token_ids"]


def kill_and_wait(server, title):
    """Kill the server's child process with this title, and wait until another process with the same title has replaced it."""
    old = server.children()[title]
    os.kill(old, signal.SIGKILL)
    wait_until(lambda: server.children().get(title, old) != old, f"another {title}", seconds=40)


def pause_worker(server):
    """Stop the API worker that begins last, as soon as its process exists. Returns the process id."""
    workers = int(server._environment.get("TIDEGATE_API_WORKERS", 1))
    begun = []

    def all_begin():
        with contextlib.suppress(psutil.Error):
            found = psutil.Process(server.pid).children()
            begun[:] = sorted(child.pid for child in found if "server.supervise.worker" in child.cmdline())
        return len(begun) == workers

    wait_until(all_begin, "the workers begin", seconds=40)
    os.kill(begun[-1], signal.SIGSTOP)
    return begun[-1]


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def logged(server, *words):
    return [line for line in server.lines if all(word in str(line) for word in words)]


# ---- Processes die in a row ----


@pytest.mark.parametrize("name", ["engine 0", "api 0"])
def test_a_process_that_is_killed_again_and_again_after_serving_does_not_end_the_server(name):
    with ServerChild(crash_limit=2, worker_stall_timeout_s=2, log_level="debug") as server:
        for number in range(2):
            assert len(generate(server, number)) == 5
            wait_until(lambda number=number: len(server.said(f"{name} has served")) == number + 1, "the supervisor knows")
            kill_and_wait(server, f"tidegate: {name}")
            wait_until(lambda: is_ready(server), "ready again", seconds=40)
        assert not server.pid_gone


def test_engines_that_never_end_their_first_step_end_the_server():
    """A step takes sixteen minutes, so each engine is killed as stalled. The request may see ten deaths, so the crash limit of
    three ends the server first."""
    with ServerChild(crash_limit=3, max_deaths=10, fake_step_ms=1_000_000, stall_timeout_s=1) as server:
        answer = plain_http.post(server.url + "/v1/generate", json=body(1), timeout=60)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_unavailable")
        assert server.process.wait(20) == 1
        wait_until(lambda: logged(server, "engine 0 died 3 times and served nothing in between"), "the reason")


def test_a_restart_that_finds_its_checkpoint_unreadable_is_tried_again(tmp_path):
    """An unreadable checkpoint does not end a server that has been ready. An engine also ends with this exit code if another
    program uses the memory for a moment."""
    folder = write_tiny_checkpoint(tmp_path)
    with ServerChild(model=folder) as server:
        config = folder / "config.json"
        config.rename(tmp_path / "away")
        os.kill(server.children()[ENGINE], signal.SIGKILL)
        wait_until(lambda: logged(server, "engine 0 died", "exit code 2"), "a death", seconds=40)
        (tmp_path / "away").rename(config)
        wait_until(lambda: is_ready(server), "ready again", seconds=40)
        assert len(generate(server)) == 5


def test_a_process_that_cannot_be_started_for_lack_of_descriptors_is_tried_again(fresh):
    supervisor = psutil.Process(fresh.pid)
    old = supervisor.rlimit(psutil.RLIMIT_NOFILE)
    supervisor.rlimit(psutil.RLIMIT_NOFILE, (3, old[1]))
    os.kill(fresh.children()[ENGINE], signal.SIGKILL)
    wait_until(lambda: logged(fresh, "engine 0 died", "could not be started", "Too many open files"), "a death", seconds=40)
    supervisor.rlimit(psutil.RLIMIT_NOFILE, old)
    wait_until(lambda: is_ready(fresh), "ready again", seconds=40)
    assert len(generate(fresh)) == 5
    assert sorted(fresh.children()) == ["tidegate: api 0", ENGINE]


# ---- Processes hang ----


def test_an_engine_that_hangs_while_it_starts_is_killed(tmp_path):
    """The starting engine hangs because a file of its checkpoint is a pipe that nobody writes to."""
    folder = tmp_path / "model"
    shutil.copytree(write_tiny_checkpoint(tmp_path / "demo"), folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    os.mkfifo(folder / "generation_config.json")
    # With generation_config off, API workers do not read that file. On a busy machine a worker needs seconds for its start.
    server = ServerChild(model=folder, generation_config="off", start_timeout_s=15, crash_limit=1)
    server.start()
    gives_up_on(server, "engine 0", 15)


def test_a_worker_that_is_stopped_while_it_starts_is_killed():
    server = ServerChild(start_timeout_s=5, crash_limit=1)
    server.start()
    pause_worker(server)
    gives_up_on(server, "api 0", 5)


def test_a_server_stops_while_one_of_its_workers_hangs_in_its_start():
    server = ServerChild(api_workers=2, drain_timeout_s=3600)
    server.start()
    pause_worker(server)
    try:
        wait_until(lambda: server.said("engine found"), "the other worker has an engine", seconds=40)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(30) == 0
    finally:
        server.stop()


def gives_up_on(server, name, start_timeout_s):
    try:
        assert server.process.wait(60) == 1
        wait_until(lambda: server.said(f"{name} makes no progress and is killed"), "the reason")
        assert server.said(f"{name} makes no progress and is killed")[0]["start_timeout_s"] == start_timeout_s
    finally:
        server.stop()


def test_a_stopped_worker_is_replaced_and_fresh_connections_are_served():
    with ServerChild(api_workers=2, worker_stall_timeout_s=2) as server:
        title = "tidegate: api 1"
        old = server.children()[title]
        os.kill(old, signal.SIGSTOP)
        wait_until(lambda: server.children().get(title, old) != old, "another worker", seconds=40)
        assert server.said("api 1 makes no progress and is killed")[0]["worker_stall_timeout_s"] == 2
        assert not psutil.pid_exists(old)
        for number in range(20):
            assert grpc_status(server, number) == SERVING
            assert len(generate(server, number)) == 5


# ---- Readiness is reported rightly ----


def test_no_worker_says_that_the_server_is_ready_before_all_are():
    server = ServerChild(api_workers=3, port=free_port(), grpc_port=free_port())
    server.start()
    try:
        late = pause_worker(server)
        server.port, server.grpc_port = (int(server._environment[f"TIDEGATE_{name}"]) for name in ("PORT", "GRPC_PORT"))
        wait_until(lambda: len(server.said("engine found")) == 2, "two workers have an engine", seconds=40)
        answer = ready(server)
        assert answer.status_code == 503
        assert answer.json()["reason"] == "another API worker is still starting"
        assert plain_http.get(server.url + "/health/startup").status_code == 503
        assert plain_http.get(server.url + "/health/live").status_code == 200
        os.kill(late, signal.SIGCONT)
        wait_until(lambda: is_ready(server), "ready", seconds=40)
        assert all(is_ready(server) for _ in range(50))
        assert all(grpc_status(server, number) == SERVING for number in range(10))
        assert plain_http.get(server.url + "/health/startup").status_code == 200
    finally:
        server.stop()


def test_a_replaced_worker_accepts_nobody_before_it_can_serve():
    with ServerChild(api_workers=2) as server:
        old = server.children()["tidegate: api 1"]
        os.kill(old, signal.SIGKILL)
        wait_until(lambda: not psutil.pid_exists(old), "its death")
        answers = []

        def is_back():
            answers.append(ready(server))
            return len(server.said("engine found")) == 3

        wait_until(is_back, "the worker is back", seconds=40)
        answers += [ready(server) for _ in range(20)]
        assert {answer.status_code for answer in answers} == {200}


# ---- The server keeps its sockets in a private folder ----


async def test_a_server_goes_on_when_its_folder_is_deleted():
    with ServerChild(api_workers=2) as server:
        (folder,) = (os.path.join(server.folder.name, name) for name in os.listdir(server.folder.name))
        async with http(server) as client:
            first = asyncio.Event()
            stream = asyncio.create_task(stream_tokens(client, 1, 400, first=first))
            await first.wait()
            shutil.rmtree(folder)
            await in_thread(wait_until, lambda: logged(server, "private folder was deleted and is made again"), "a log line")
            assert len(await stream) == 400
        for title, workers in (("tidegate: api 0", 1), (ENGINE, 2), ("tidegate: api 1", 1)):
            found = len(server.said("engine found")) + workers
            await in_thread(kill_and_wait, server, title)
            await in_thread(wait_until, lambda found=found: len(server.said("engine found")) == found, "all are back", seconds=40)
        for number in range(10):
            assert len(await in_thread(generate, server, number)) == 5
        assert (await in_thread(httpx.get, server.url + "/metrics")).status_code == 200
        server.process.send_signal(signal.SIGTERM)
        assert await in_thread(server.process.wait, 20) == 0
        assert os.listdir(server.folder.name) == []


# ---- Signals stop the server ----


async def test_a_hangup_drains_as_sigterm_does(fresh):
    async with http(fresh) as client:
        first = asyncio.Event()
        stream = asyncio.create_task(stream_tokens(client, 1, 300, first=first))
        await first.wait()
        fresh.process.send_signal(signal.SIGHUP)
        assert len(await stream) == 300
    assert await in_thread(fresh.process.wait, 20) == 0
    assert os.listdir(fresh.folder.name) == []


def test_a_hangup_is_ignored_under_nohup():
    with ServerChild(shell="trap '' HUP") as server:
        server.process.send_signal(signal.SIGHUP)
        assert len(generate(server)) == 5
        assert not server.said("stopping")


async def test_sigquit_ends_everything_at_once():
    with ServerChild(fake_step_ms=50) as server:
        children = [psutil.Process(pid) for pid in server.children().values()]
        async with http(server) as client:
            first = asyncio.Event()
            stream = asyncio.create_task(stream_tokens(client, 1, 400, first=first))
            await first.wait()
            server.process.send_signal(signal.SIGQUIT)
            assert (await stream)["code"] == "engine_unavailable"
        assert await in_thread(server.process.wait, 20) == 0
        assert not any(child.is_running() for child in children)
        assert os.listdir(server.folder.name) == []


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2])
def test_signals_without_a_meaning_are_ignored(server, number):
    server.process.send_signal(number)
    wait_until(lambda: logged(server, f"{number.name} has no meaning here"), "a log line")
    assert len(generate(server)) == 5


# ---- The host lacks a resource ----


@pytest.mark.parametrize(
    ("shell", "variables", "expected"),
    [
        ("ulimit -n 20", {}, "may have 20 files and sockets open, and a server with api_workers=1 needs at least 64"),
        ("ulimit -n 200", {"TIDEGATE_API_WORKERS": "100"}, "a server with api_workers=100 needs at least 420"),
        ("ulimit -f 0", {}, "no folder for temporary files can be used"),
    ],
    ids=["descriptors", "descriptors for many workers", "temporary folder"],
)
def test_what_the_host_lacks_is_said_in_one_sentence(shell, variables, expected):
    done = refused_start(variables, shell)
    assert len(done.stderr.strip().splitlines()) == 1
    assert expected in done.stderr


def test_a_server_uses_all_descriptors_that_it_may_have():
    with ServerChild(shell="ulimit -Sn 20") as server:
        for pid in (server.pid, *server.children().values()):
            soft, hard = psutil.Process(pid).rlimit(psutil.RLIMIT_NOFILE)
            assert soft == hard > 20
        assert len(generate(server)) == 5


def test_a_server_runs_from_a_source_tree_without_installed_metadata(tmp_path):
    """The interpreter without the virtual environment sees all packages of the environment but this project's own.

    The source tree is linked, since an installation in place leaves its metadata beside the sources.
    """
    packages = Path(sysconfig.get_path("purelib"))
    for entry in itertools.chain(packages.iterdir(), Path(sysconfig.get_path("platlib")).iterdir()):
        if "tidegate" not in entry.name and not (tmp_path / entry.name).exists():
            (tmp_path / entry.name).symlink_to(entry)
    tree = tmp_path / "source tree"
    tree.mkdir()
    for name in ("engine", "server"):
        (tree / name).symlink_to(ROOT / name)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    probe = "import importlib.metadata as m\ntry: m.version('tidegate')\nexcept m.PackageNotFoundError: print('not installed')"
    command = [sys._base_executable, "-c", probe]
    found = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=True)
    assert found.stdout == "not installed\n"
    server = ServerChild(
        python=sys._base_executable, shell=f"cd '{tree}'; export PYTHONPATH='{tmp_path}'", model=bundled_checkpoint()
    )
    with server:
        assert plain_http.get(server.url + "/version").json() == {"version": __version__}
        assert len(generate(server)) == 5
