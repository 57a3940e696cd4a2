"""Tests what `tidegate compile` says of wrong input. tests/parity has the tests of what it compiles."""

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest

from engine.errors import ConfigError
from server import compile as kernels
from server.settings import Settings

HARDWARE = SimpleNamespace(GPUS={"h100": "an H100", "h200": "an H200"}, present=lambda: None)


def test_without_triton_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs Triton, which is not installed: run .*pip install 'triton>=3\.6'"):
        kernels.run(Settings(model="x"), Path("kernels"), "h200")


def test_an_unknown_gpu_lists_the_known_ones():
    with pytest.raises(ConfigError, match="gpu is 'h300': it must be one of h100, h200") as error:
        kernels.find_gpu(HARDWARE, "h300")
    assert error.value.param == "gpu"


def test_without_a_gpu_one_must_be_named():
    with pytest.raises(ConfigError, match="this machine has no GPU: name one with --gpu, one of h100, h200"):
        kernels.find_gpu(HARDWARE, None)
    assert kernels.find_gpu(HARDWARE, "h100") == "an H100"
