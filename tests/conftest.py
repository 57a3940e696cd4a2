"""Fixtures that tests of several folders share."""

import pytest

from tests.support.children import ServerChild


@pytest.fixture(scope="module")
def server():
    """A whole `tidegate serve` with a fake engine, for tests that leave it as it was."""
    with ServerChild() as child:
        yield child
