"""Builds the gRPC server of one API worker, with the services tidegate.v1.Inference, health and reflection, and with limits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grpc
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from engine.errors import ConfigError
from server.metrics.registry import Metrics
from server.rpc.calls import CallGate
from server.rpc.health import HealthServicer
from server.rpc.pb.tidegate.v1 import inference_pb2 as pb
from server.rpc.reflection import ReflectionServicer
from server.rpc.servicer import InferenceServicer
from server.service.connections import connection_limits
from server.service.service import GenerateService
from server.settings import Settings

INFERENCE: str = pb.DESCRIPTOR.services_by_name["Inference"].full_name
HEALTH: str = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
REFLECTION: ServiceDescriptor = reflection_pb2.DESCRIPTOR.services_by_name["ServerReflection"]
MAX_STREAMS = 1024  # largest number of calls on one connection at once
PING_SECONDS = 30  # time between the server's pings, which detect clients that have left without closing their connection
PONG_SECONDS = 10  # time that a client has to answer a ping
MIN_CLIENT_PING_SECONDS = 10  # least time between a client's pings; a client that pings more often is disconnected


class RpcServer:
    """Runs one gRPC server. Call `start`, then `drain` when new clients should go elsewhere, then `stop`. `port` is the bound
    port."""

    def __init__(self, server: grpc.aio.Server, health: HealthServicer, port: int) -> None:
        self._server = server
        self._health = health
        self.port = port

    async def start(self) -> None:
        await self._server.start()

    def drain(self) -> None:
        """Let the health service answer NOT_SERVING from now on. The server still answers new calls."""
        self._health.drain()

    async def stop(self, grace: float | None = None) -> None:
        """Refuse new calls, and after `grace` seconds cancel the calls that still run."""
        self.drain()
        await self._server.stop(grace)


def build_rpc_server(service: GenerateService, settings: Settings, metrics: Metrics) -> RpcServer:
    """Build the gRPC server and bind its port. Call this function in the event loop that will run the server. Raises ConfigError
    if the port cannot be bound."""
    server = grpc.aio.server(options=_options(settings))
    gate = CallGate(settings, metrics)
    health = HealthServicer(lambda: service.health().ready, (INFERENCE,))
    _add(server, gate, pb.DESCRIPTOR.services_by_name["Inference"], InferenceServicer(service, settings))
    _add(server, gate, health_pb2.DESCRIPTOR.services_by_name["Health"], health)
    _add(server, gate, REFLECTION, ReflectionServicer((INFERENCE, HEALTH, REFLECTION.full_name)))
    return RpcServer(server, health, _bind(server, settings))


def _add(server: grpc.aio.Server, gate: CallGate, service: ServiceDescriptor, servicer: object) -> None:
    """Register the methods of `servicer`, as the generated `add_..._to_server` does, but pass them undecoded messages.

    The decorator `answers_errors` decodes each message, so that a wrong message is answered with INVALID_ARGUMENT.
    """
    handlers = {method.name: _handler(gate, method, getattr(servicer, method.name)) for method in service.methods}
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(service.full_name, handlers)])


def _handler(gate: CallGate, method: MethodDescriptor, answer: Callable[..., Any]) -> grpc.RpcMethodHandler[bytes, Message]:
    streams = method.client_streaming or method.server_streaming
    make = grpc.stream_stream_rpc_method_handler if streams else grpc.stream_unary_rpc_method_handler
    route = f"/{method.containing_service.full_name}/{method.name}"
    handler = gate.many_messages(route, answer) if method.client_streaming else gate.one_message(route, answer)
    return make(handler, response_serializer=GetMessageClass(method.output_type).SerializeToString)


def _bind(server: grpc.aio.Server, settings: Settings) -> int:
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    try:
        return server.add_insecure_port(f"{host}:{settings.grpc_port}")
    except RuntimeError:
        raise ConfigError(
            f"grpc_port is {settings.grpc_port}, which cannot be had on {settings.host}: another program has it, or this "
            "machine has no such address",
            param="grpc_port",
        ) from None


def _options(settings: Settings) -> list[tuple[str, int]]:
    return [
        ("grpc.so_reuseport", int(settings.api_workers > 1)),  # grpc's default, on, would share the port with any other program
        ("grpc.max_receive_message_length", settings.max_body_bytes),
        ("grpc.max_metadata_size", settings.max_header_bytes),
        ("grpc.absolute_max_metadata_size", settings.max_header_bytes),
        ("grpc.compression_enabled_algorithms_bitset", 1),  # no compression: a few kilobytes of gzip can unpack to gigabytes
        ("grpc.max_allowed_incoming_connections", connection_limits(settings).grpc),
        ("grpc.max_concurrent_streams", MAX_STREAMS),
        ("grpc.server_handshake_timeout_ms", int(settings.header_timeout_s * 1000)),
        ("grpc.max_connection_idle_ms", int(settings.idle_timeout_s * 1000)),
        ("grpc.keepalive_time_ms", PING_SECONDS * 1000),
        ("grpc.keepalive_timeout_ms", PONG_SECONDS * 1000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", MIN_CLIENT_PING_SECONDS * 1000),
        ("grpc.http2.max_ping_strikes", 2),
    ]
