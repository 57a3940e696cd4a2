"""EngineClients with the timeouts and limits of the default settings."""

from server.engines.client import EngineClient
from server.settings import Settings

NAMES = ("stall_timeout_s", "resume_timeout_s", "max_deaths", "max_queue", "max_queue_tokens")


def engine_client(endpoints, worker="api 0", **changes):
    defaults = Settings()
    return EngineClient(endpoints, worker, **({name: getattr(defaults, name) for name in NAMES} | changes))
