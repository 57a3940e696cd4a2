import os
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from server import cli
from server.settings import Settings, flag
from tests.support.children import ROOT


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for name in list(os.environ):
        if name.startswith("TIDEGATE_"):
            monkeypatch.delenv(name)


@pytest.fixture
def served(monkeypatch):
    """The settings that `serve` would have begun with."""
    seen = []

    class Supervisor:
        @staticmethod
        def serve(settings):
            seen.append(settings)
            return 0

    monkeypatch.setattr(cli, "_load", lambda module: Supervisor)
    return seen


def test_every_setting_is_a_flag():
    shown = CliRunner().invoke(cli.app, ["serve", "--help"], env={"COLUMNS": "300"}).output
    assert not [name for name in Settings.model_fields if flag(name) not in shown]


def test_flags_become_settings(served):
    done = CliRunner().invoke(cli.app, ["serve", "--port", "0", "--no-prefix-caching", "--overlap", "--max-n", "3"])
    assert done.exit_code == 0, done.output
    assert (served[0].port, served[0].prefix_caching, served[0].overlap, served[0].max_n) == (0, False, True, 3)
    assert served[0].grpc_port == 9000


def run(*words, **variables):
    command = [sys.executable, "-m", "server.cli", *words]
    return subprocess.run(
        command, cwd=ROOT, env={**os.environ, **variables}, capture_output=True, text=True, check=False, timeout=120
    )


def test_a_wrong_setting_is_one_message_and_exit_code_2():
    done = run("serve", "--port", "many")
    assert done.returncode == 2
    assert done.stderr == "tidegate: port is 'many' (from --port): it must be a whole number from 0 to 65535\n"


def test_doctor_names_what_is_missing():
    done = run("doctor", "--model", "/nowhere", "--port", "0", "--grpc-port", "0")
    assert done.returncode == 1
    assert "/nowhere is no checkpoint folder" in done.stdout
    assert "torch" in done.stdout


def test_doctor_is_content_with_the_demo():
    done = run("doctor", "--port", "0", "--grpc-port", "0")
    assert done.returncode == 0, done.stdout
    assert "MISSING" not in done.stdout


def test_generate_prints_the_text_alone():
    done = run("generate", "hello", "--max-tokens", "8", "--temperature", "0")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert run("generate", "hello", "--max-tokens", "8", "--temperature", "0").stdout == done.stdout


def test_generate_refuses_what_cannot_be():
    done = run("generate", "hello", "--temperature", "-1")
    assert done.returncode == 1
    assert done.stderr == "tidegate: temperature is -1.0: it must lie between 0.0 and 100.0\n"
