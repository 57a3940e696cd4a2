import pytest

from server.engines.client import EngineClient
from tests.unit.server.engines.scripted_engine import ScriptedEngine


@pytest.fixture
def engine(tmp_path):
    scripted = ScriptedEngine(f"ipc://{tmp_path}/engine")
    scripted.start()
    yield scripted
    scripted.close()


@pytest.fixture
async def client(engine):
    """Yield an EngineClient with one engine, which has accepted it."""
    client = EngineClient([engine.endpoint], "api 0", resume_timeout_s=30, max_queue=2)
    await client.start()
    await engine.accept()
    await client.wait_ready(5)
    yield client
    await client.close()
