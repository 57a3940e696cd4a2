"""Sets the options of a test run (processes, threads, `--torch-free`, `--need-torch`), and defines fixtures that tests of
several folders share."""

import functools
import os
import re
import sys
from pathlib import Path

import hypothesis
import pytest

from tests.support.children import ServerChild
from tests.support.cpus import usable_cpus

HAS_GPU = Path("/dev/nvidiactl").exists()

if not HAS_GPU:
    # Triton's interpreter runs the kernels on the CPU. Triton reads the variable when it is imported, and torch imports Triton.
    os.environ["TRITON_INTERPRET"] = "1"
    # The models of the tests are tiny. With more threads, torch's threads spin while they wait and slow the other processes
    # down up to twenty-fold. torch reads the variable when it is imported; child processes inherit it.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# The time that an example takes on a busy machine says nothing about the code, so Hypothesis does not limit it.
hypothesis.settings.register_profile("full", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("full")

TESTS = Path(__file__).parent
NEED_TORCH = ("model", "parity", "e2e", "train")  # folders whose tests need torch, since they run models or start servers
NEED = "attention|device|kernels|kvcache\\.storage|layers|sampling|weights"
IMPORTS_TORCH = re.compile(rf"^(import|from) (torch|engine\.({NEED}))\b", re.M)
MARKS_TORCH = re.compile(r"\bmark\.torch\b")


@functools.cache
def imports_torch(path):
    """Return whether all tests of the file `path` need torch, because of its folder or its imports."""
    return path.relative_to(TESTS).parts[0] in NEED_TORCH or IMPORTS_TORCH.search(path.read_text()) is not None


@functools.cache
def marks_torch(path):
    """Return whether tests of the file `path` may have the mark `torch`."""
    return MARKS_TORCH.search(path.read_text()) is not None


def needs_torch(item):
    """Return whether a test needs torch. `--need-torch` runs the tests that do, and `--torch-free` those that do not."""
    marked = item.get_closest_marker("torch") is not None
    if marked and not marks_torch(item.path):
        raise pytest.UsageError(f"{item.nodeid}: set the mark torch in the test's own file, where --need-torch looks for it")
    return marked or imports_torch(item.path)


def pytest_addoption(parser):
    parser.addoption("--torch-free", action="store_true", help="only tests that need no torch; importing it then fails")
    parser.addoption("--need-torch", action="store_true", help="only the other tests, those that --torch-free leaves out")
    parser.addoption("--clients", help="run tests/clients/ with these clients: ci, all, or names of environments with commas")


def pytest_xdist_auto_num_workers(config):
    """Return the number of processes for `-n auto`; 0 runs the tests in pytest's own process.

    Tests of servers wait for them, so one process more than CPUs keeps the CPUs busy. On a machine with a GPU, tests that may use
    it run one after the other, since several processes would share the GPU's memory. The variable PYTEST_XDIST_AUTO_NUM_WORKERS
    has precedence.
    """
    if "PYTEST_XDIST_AUTO_NUM_WORKERS" in os.environ:
        return None  # xdist's own hook reads the variable
    if config.getoption("--torch-free"):
        return usable_cpus()
    return 0 if HAS_GPU else usable_cpus() + 1


def pytest_configure(config):
    if config.getoption("--torch-free"):
        if config.getoption("--need-torch"):
            raise pytest.UsageError("--torch-free and --need-torch together leave no test")
        sys.modules["torch"] = None  # type: ignore[assignment]  # any import of it raises
        hypothesis.settings.register_profile("quick", hypothesis.settings.get_profile("full"), max_examples=25)
        hypothesis.settings.load_profile("quick")


def pytest_ignore_collect(collection_path, config):
    """Leave out the files without a test to run, so that a run with one of the two options collects only the others."""
    if collection_path == TESTS / "clients" and not config.getoption("--clients"):
        return True  # they need the clients, which `make test-clients` installs
    if config.getoption("--torch-free"):
        if collection_path.is_dir():
            return True if collection_path.parent == TESTS and collection_path.name in NEED_TORCH else None
        return True if collection_path.suffix == ".py" and imports_torch(collection_path) else None
    if config.getoption("--need-torch") and collection_path.suffix == ".py":
        return None if imports_torch(collection_path) or marks_torch(collection_path) else True
    return None


def pytest_collection_modifyitems(config, items):
    need_torch = config.getoption("--need-torch")
    if config.getoption("--torch-free") or need_torch:
        wanted = [needs_torch(item) == need_torch for item in items]
        config.hook.pytest_deselected(items=[item for item, kept in zip(items, wanted, strict=True) if not kept])
        items[:] = [item for item, kept in zip(items, wanted, strict=True) if kept]


@pytest.fixture
def fresh():
    """Yield a `tidegate serve` with a fake engine that runs for one test only, for tests that kill, stop or overload the
    server."""
    with ServerChild() as child:
        yield child


@pytest.fixture(scope="module")
def server():
    """Yield a `tidegate serve` with a fake engine, shared by the tests of a module that leave the server unchanged."""
    with ServerChild() as child:
        yield child
