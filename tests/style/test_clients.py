"""Tests that docs/clients.md tells what the tests of real clients check, and that a missing client fails them."""

import json
import re
from pathlib import Path

import pytest

from tests.clients import install
from tests.clients.clients import CLIENTS
from tests.clients.table import table

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "clients.md").read_text()


def test_the_page_has_the_table_of_the_clients():
    assert table() in PAGE, "put the output of `python -m tests.clients.table` into docs/clients.md"


@pytest.mark.parametrize("name", ["lm_eval", "guidellm", "aiperf", "@bufbuild/buf", "@grpc/grpc-js"])
def test_the_page_has_the_versions_of_the_tools(name):
    if name.startswith("@"):
        version = json.loads((install.LOCKS / "package-lock.json").read_text())["packages"][f"node_modules/{name}"]["version"]
    else:
        version = dict(line.split("==") for line in (install.LOCKS / f"{name}.txt").read_text().splitlines())[name]
    short = {"@bufbuild/buf": "buf curl"}.get(name, name)
    assert re.search(rf"^\| [^|]*{re.escape(short)}[^|]*\| {re.escape(version)} \|", PAGE, re.M)


def test_every_environment_has_a_lock_file_that_pins_every_package():
    for name, environment in install.ENVIRONMENTS.items():
        lines = (install.LOCKS / f"{name}.txt").read_text().splitlines()
        assert [line for line in lines if not re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9._!]+", line)] == []
        pinned = {line.split("==")[0] for line in lines}
        assert name == "node" or set(environment.clients) <= pinned
    wanted = json.loads((install.LOCKS / "package.json").read_text())["dependencies"]
    assert set(install.ENVIRONMENTS["node"].clients) <= set(wanted)
    assert all(version[0].isdigit() for version in wanted.values()), "name exact versions in package.json"


def test_ci_runs_the_clients_that_it_must():
    clients = [client for name in install.chosen("ci") for client in install.ENVIRONMENTS[name].clients]
    assert set(clients) >= {"openai", "litellm", "ai", "@bufbuild/buf", "@grpc/grpc-js"}
    assert "make test-clients CLIENTS=ci" in (ROOT / ".ci" / "run").read_text()


def test_an_unknown_environment_is_named():
    with pytest.raises(ValueError, match="there is no environment 'nothing'"):
        install.chosen("openai,nothing")


@pytest.mark.parametrize("name", CLIENTS)
def test_a_client_that_is_not_installed_is_an_error(name, tmp_path, monkeypatch):
    monkeypatch.setattr(install, "BUILD", tmp_path)
    with pytest.raises(FileNotFoundError, match="make test-clients"):
        _ = CLIENTS[name].command


def test_an_environment_is_made_again_when_its_lock_changes_or_the_installation_was_cut_off(tmp_path, monkeypatch):
    steps = []

    def step(command, **_):
        """Stand in for the steps of an installation: make the folder of the environment, and count the others."""
        if "venv" in command:
            Path(command[-1]).mkdir(parents=True)
        steps.append(command)

    monkeypatch.setattr(install, "LOCKS", tmp_path)
    monkeypatch.setattr(install, "BUILD", tmp_path / "build")
    monkeypatch.setattr(install.subprocess, "run", step)
    lock, stamp = tmp_path / "openai.txt", tmp_path / "build" / "openai" / "stamp"
    lock.write_text("openai==1.0\n")
    assert [install.install("openai"), install.install("openai")] == [True, False]
    lock.write_text("openai==1.1\n")
    assert [install.install("openai"), install.install("openai")] == [True, False]
    stamp.unlink()
    assert [install.install("openai"), install.install("openai")] == [True, False]
    assert len(steps) == 3 * 3  # venv, pip install, pip check


def test_torch_is_installed_before_the_other_packages(tmp_path, monkeypatch):
    commands = []
    monkeypatch.setattr(install.subprocess, "run", lambda command, **_: commands.append(command))
    install._pip_install(tmp_path, install.LOCKS / "guidellm.txt")
    first, second, _ = commands
    assert first[-1].startswith("torch==")
    assert "--no-deps" not in first
    assert "--no-deps" in second
