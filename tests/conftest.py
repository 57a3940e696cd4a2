"""Fixtures that tests of several folders share."""

import os
from pathlib import Path

import pytest

from tests.support.children import ServerChild

if not Path("/dev/nvidiactl").exists():
    # No GPU: Triton's interpreter runs the kernels. It must be told before anything, torch included, imports Triton.
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="module")
def server():
    """A whole `tidegate serve` with a fake engine, for tests that leave it as it was."""
    with ServerChild() as child:
        yield child
