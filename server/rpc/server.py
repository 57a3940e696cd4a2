"""The gRPC server of one API worker: tidegate.v1.Inference, health and reflection, bound and limited as the settings say."""

from __future__ import annotations

import grpc
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from engine.errors import ConfigError
from server.rpc.health import HealthServicer
from server.rpc.pb.tidegate.v1 import inference_pb2 as pb
from server.rpc.reflection import ReflectionServicer
from server.rpc.servicer import InferenceServicer
from server.service.service import GenerateService
from server.settings import Settings

INFERENCE: str = pb.DESCRIPTOR.services_by_name["Inference"].full_name
HEALTH: str = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
REFLECTION: ServiceDescriptor = reflection_pb2.DESCRIPTOR.services_by_name["ServerReflection"]
MAX_STREAMS = 1024  # calls at once on one connection
PING_SECONDS = 30  # between our pings, which find clients that vanished without a word
PONG_SECONDS = 10
MIN_CLIENT_PING_SECONDS = 10  # a client that pings oftener than this is cut off


class RpcServer:
    """`start`, then `drain` when it should get no new clients, then `stop`. `port` is the one it is bound to."""

    def __init__(self, server: grpc.aio.Server, health: HealthServicer, port: int) -> None:
        self._server = server
        self._health = health
        self.port = port

    async def start(self) -> None:
        await self._server.start()

    def drain(self) -> None:
        """The health service says NOT_SERVING; calls go on being taken and answered."""
        self._health.drain()

    async def stop(self, grace: float | None = None) -> None:
        """Take no more calls, and cancel those that run after `grace` seconds."""
        self.drain()
        await self._server.stop(grace)


def build_rpc_server(service: GenerateService, settings: Settings) -> RpcServer:
    """Call it in the event loop that will run the server. Raises ConfigError where the port cannot be had."""
    server = grpc.aio.server(options=_options(settings))
    health = HealthServicer(lambda: service.health().ready, (INFERENCE,))
    _add(server, pb.DESCRIPTOR.services_by_name["Inference"], InferenceServicer(service, settings.send_timeout_s))
    _add(server, health_pb2.DESCRIPTOR.services_by_name["Health"], health)
    _add(server, REFLECTION, ReflectionServicer((INFERENCE, HEALTH, REFLECTION.full_name)))
    return RpcServer(server, health, _bind(server, settings))


def _add(server: grpc.aio.Server, service: ServiceDescriptor, servicer: object) -> None:
    """What the generated `add_..._to_server` does, but for the bytes of a request: `answers_errors` reads them."""
    server.add_generic_rpc_handlers(
        [grpc.method_handlers_generic_handler(service.full_name, {m.name: _handler(m, servicer) for m in service.methods})]
    )


def _handler(method: MethodDescriptor, servicer: object) -> grpc.RpcMethodHandler[bytes, Message]:
    if method.client_streaming:
        make = grpc.stream_stream_rpc_method_handler
    else:
        make = grpc.unary_stream_rpc_method_handler if method.server_streaming else grpc.unary_unary_rpc_method_handler
    return make(getattr(servicer, method.name), response_serializer=GetMessageClass(method.output_type).SerializeToString)


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
        ("grpc.so_reuseport", int(settings.api_workers > 1)),  # the default would share the port with any other program
        ("grpc.max_receive_message_length", settings.max_body_bytes),
        ("grpc.max_metadata_size", settings.max_header_bytes),
        ("grpc.absolute_max_metadata_size", settings.max_header_bytes),
        ("grpc.compression_enabled_algorithms_bitset", 1),  # none: a few kilobytes of gzip could unpack to gigabytes
        ("grpc.max_concurrent_streams", MAX_STREAMS),
        ("grpc.server_handshake_timeout_ms", int(settings.header_timeout_s * 1000)),
        ("grpc.max_connection_idle_ms", int(settings.idle_timeout_s * 1000)),
        ("grpc.keepalive_time_ms", PING_SECONDS * 1000),
        ("grpc.keepalive_timeout_ms", PONG_SECONDS * 1000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", MIN_CLIENT_PING_SECONDS * 1000),
        ("grpc.http2.max_ping_strikes", 2),
    ]
