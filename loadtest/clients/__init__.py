"""Clients of the routes. `build_client` returns the one of a target."""

from loadtest.clients.base import Client
from loadtest.clients.grpc_client import GrpcClient
from loadtest.clients.http_client import HttpClient
from loadtest.spec import Load, Target

__all__ = ["Client", "build_client"]


def build_client(target: Target, load: Load) -> Client:
    """Return a client. It must be made, and used, within a running event loop."""
    return GrpcClient(target, load) if target.route == "grpc" else HttpClient(target, load)
