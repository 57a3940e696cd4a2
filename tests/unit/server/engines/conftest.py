import pytest

from tests.support.engine_client import engine_client
from tests.unit.server.engines.scripted_engine import ScriptedEngine


@pytest.fixture
def engine(tmp_path):
    scripted = ScriptedEngine(f"ipc://{tmp_path}/engine")
    scripted.start()
    yield scripted
    scripted.close()


@pytest.fixture
async def client(engine):
    """A client whose only engine has accepted it."""
    client = engine_client([engine.endpoint], resume_timeout_s=30, max_queue=2)
    await client.start()
    await engine.accept()
    await client.wait_ready(5)
    yield client
    await client.close()
