"""Tests that the command of each stage of `python -m train` exists and accepts its arguments. Other tests cover the stages'
parts."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from train.__main__ import stages

ROOT = Path(__file__).parents[2]
COMMANDS = [(stage, command) for stage, commands in stages(Path("work")).items() for command in commands]


def parse(name, arguments):
    """Parse a stage's command line without running the stage. Raises click's UsageError for wrong arguments."""
    module = importlib.import_module(name)
    app = getattr(module, "app", None)
    if app is None:
        app = typer.Typer()
        app.command()(module.main)
    command = typer.main.get_command(app)
    if hasattr(command, "commands"):
        command, arguments = command.commands[arguments[0]], arguments[1:]
    command.make_context(name, list(arguments))


@pytest.mark.parametrize(("stage", "command"), COMMANDS, ids=[f"{s}-{i}" for i, (s, _) in enumerate(COMMANDS)])
def test_each_command_takes_its_arguments(stage, command):
    if "-m" in command:  # on several GPUs, the command begins with torch's launcher
        command = command[command.index("-m") + 1 :]
    parse(command[0], command[1:])


def test_a_stage_that_is_none_is_refused():
    done = subprocess.run(
        [sys.executable, "-m", "train", "--first", "bake"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "fetch, corpus" in done.stderr
