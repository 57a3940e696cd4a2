"""Fixtures that tests of several folders share."""

import os
import re
import sys
from pathlib import Path

import hypothesis
import pytest

from tests.support.children import ServerChild

if not Path("/dev/nvidiactl").exists():
    # No GPU: Triton's interpreter runs the kernels. It must be told before anything, torch included, imports Triton.
    os.environ["TRITON_INTERPRET"] = "1"

# Shared machines are slow at times: how long an example takes says nothing about the code.
hypothesis.settings.register_profile("shared", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("shared")

TESTS = Path(__file__).parent
NEED_TORCH = ("model", "parity", "e2e", "train")  # folders whose tests run models or start servers
NEED = "attention|device|kernels|kvcache\\.storage|layers|sampling|weights"
IMPORTS_TORCH = re.compile(rf"^(import|from) (torch|engine\.({NEED}))\b", re.M)


def pytest_addoption(parser):
    parser.addoption("--torch-free", action="store_true", help="only tests that need no torch; importing it then fails")


def pytest_configure(config):
    if config.getoption("--torch-free"):
        sys.modules["torch"] = None  # type: ignore[assignment]  # any import of it raises
        hypothesis.settings.register_profile("quick", hypothesis.settings.get_profile("shared"), max_examples=25)
        hypothesis.settings.load_profile("quick")


def pytest_ignore_collect(collection_path, config):
    if not config.getoption("--torch-free"):
        return None
    if collection_path.is_dir():
        return True if collection_path.parent == TESTS and collection_path.name in NEED_TORCH else None
    return True if collection_path.suffix == ".py" and IMPORTS_TORCH.search(collection_path.read_text()) else None


def pytest_collection_modifyitems(config, items):
    if config.getoption("--torch-free"):
        gone = [item for item in items if item.get_closest_marker("torch")]
        config.hook.pytest_deselected(items=gone)
        items[:] = [item for item in items if not item.get_closest_marker("torch")]


@pytest.fixture
def fresh():
    """A server of its own for each test, for tests that kill, stop or overload it."""
    with ServerChild() as child:
        yield child


@pytest.fixture(scope="module")
def server():
    """A whole `tidegate serve` with a fake engine, for tests that leave it as it was."""
    with ServerChild() as child:
        yield child
