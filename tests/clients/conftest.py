"""Starts one server with the bundled model for all tests of real clients, and runs each client's program once."""

from __future__ import annotations

import functools
import json
import os
import subprocess
from collections.abc import Callable
from typing import Any

import pytest

from tests.clients import install
from tests.clients.cases import ANSWERED, ENDED, MODEL, OTHERS, REFUSED, STRUCTURED, Case, stop_at
from tests.clients.clients import CLIENTS, Client
from tests.clients.raw import Raw
from tests.support.children import ROOT, ServerChild


def pytest_collection_modifyitems(config, items):
    """Leave out the tests whose clients were not chosen. Tests without a marker `environment` need no client."""
    if config.getoption("clients") is None:
        raise pytest.UsageError("tests/clients/ needs the clients: run `make test-clients`, which installs them")
    wanted = set(install.chosen(config.getoption("clients")))
    unwanted = [item for item in items if not {mark.args[0] for mark in item.iter_markers("environment")} <= wanted]
    config.hook.pytest_deselected(items=unwanted)
    items[:] = [item for item in items if item not in unwanted]


@pytest.fixture(scope="session")
def server():
    with ServerChild(runner="torch", served_model_name=MODEL) as child:
        yield child


@pytest.fixture(scope="session")
def raw(server):
    raw = Raw(server.url, MODEL)
    yield raw
    raw.close()


@pytest.fixture(scope="session")
def cases(raw) -> dict[str, Case]:
    """Return all calls by name."""
    (choice,) = raw.answer(ANSWERED["chat"])["choices"]
    refused = {name: case for name, (case, _, _) in REFUSED.items()}
    return {**ANSWERED, **stop_at(choice["text"]), **OTHERS, **refused, **ENDED, "structured": STRUCTURED}


@pytest.fixture(scope="session")
def execute() -> Callable[..., str]:
    """Return a function that runs a command of a client in the repository's root and returns its standard output."""

    def execute(command: list[str], given: str = "", **variables: str) -> str:
        options = {"cwd": ROOT, "env": environment() | variables, "capture_output": True, "text": True, "timeout": 300}
        done = subprocess.run(command, input=given, check=False, **options)
        assert done.returncode == 0, f"{command} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        return done.stdout

    return execute


@pytest.fixture(scope="session")
def run(server, execute) -> Callable[..., dict[str, Any]]:
    """Return a function that runs a program of programs/ with calls and returns what came of each."""

    def run(command: list[str], calls: dict[str, Case], **more: Any) -> dict[str, Any]:
        listed = [{"name": name, "call": case.call, "arguments": case.arguments} for name, case in calls.items()]
        job = {"url": server.url, "model": MODEL, "cases": listed, **more}
        return json.loads(execute(command, json.dumps(job)))

    return run


@pytest.fixture(scope="session")
def results(run, cases) -> Callable[[Client], dict[str, Any]]:
    """Return a function that returns what came of a client's calls. It runs the client's program at its first call."""

    @functools.cache
    def results(name: str) -> dict[str, Any]:
        client = CLIENTS[name]
        return run(client.command, {call: cases[call] for call in client.calls})

    return results


def environment() -> dict[str, str]:
    """Return the environment variables of a client: nothing of the project's, and no calls to anything but the server."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV", "OPENAI_"))}
    return {**kept, "NO_PROXY": "127.0.0.1", "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
