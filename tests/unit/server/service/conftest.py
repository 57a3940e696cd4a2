import pytest

from tests.support.local_engine import LocalEngine, until
from tests.unit.server.service.calls import service_over


@pytest.fixture
async def engine():
    async with LocalEngine() as engine:
        yield engine
        engine.resume()
        await until(lambda: engine.idle)  # after every test, all requests in the engine must end


@pytest.fixture
def service(engine):
    return service_over(engine)
