"""Builds the application of the admin port. Health probes, metrics scrapes and operators use the port; API clients do not need
it.

The admin port listens on 127.0.0.1 by default. Its address is a setting of its own (`admin_host`), so that the API can be open
to a network that the admin port is closed to. All API workers of a server serve the one admin port together. The port stays
open while the server drains, when the HTTP port is closed already.
"""

from __future__ import annotations

from functools import partial

from fastapi import FastAPI

from server.http.app import SERVICE_ROUTERS, application
from server.http.front import Front
from server.http.routes import cache
from server.http.routes.api import Api
from server.metrics.registry import Metrics
from server.service.service import GenerateService
from server.settings import Settings

ADMIN_ROUTERS = (cache.router, *SERVICE_ROUTERS)


def build_admin_app(settings: Settings, service: GenerateService, metrics: Metrics) -> FastAPI:
    front = partial(Front, settings=settings, host=settings.admin_host)
    api = Api.from_settings(settings, service, metrics)
    return application("Tidegate admin", "Health, metrics and administration of one server.", ADMIN_ROUTERS, api, front)
