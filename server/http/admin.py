"""The application of the admin port, for probes, scrapes and operators: nothing that clients of the API need.

The port is on 127.0.0.1 by default and has its own setting, so that it can be reachable where the API is not, and the other way
round. All API workers of a server serve it together. It stays open while the server drains, when the HTTP port is closed.
"""

from __future__ import annotations

from fastapi import FastAPI

from server.http.app import SERVICE_ROUTERS, application
from server.http.routes.api import Api
from server.metrics import Metrics
from server.service.service import GenerateService
from server.settings import Settings

ADMIN_ROUTERS = SERVICE_ROUTERS


def build_admin_app(settings: Settings, service: GenerateService, metrics: Metrics) -> FastAPI:
    api = Api(service=service, metrics=metrics, max_body_bytes=settings.max_body_bytes)
    return application("Tidegate admin", "Health, metrics and administration of one server.", ADMIN_ROUTERS, api)
