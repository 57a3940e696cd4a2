"""Binds the HTTP, admin and gRPC ports of the supervisor, and chooses the path of the engine's Unix socket."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from engine.errors import ConfigError
from server.settings import Settings

MAX_SOCKET_PATH = 107  # bytes that the address of a Unix socket can hold


def bind_http(settings: Settings) -> socket.socket:
    """Bind the HTTP port, which all workers inherit. Raises ConfigError if another program has it."""
    return _bind_tcp(settings.host, settings.port, "port")


def bind_admin(settings: Settings) -> socket.socket:
    """Bind the admin port, which all workers inherit. Raises ConfigError if another program has it."""
    return _bind_tcp(settings.admin_host, settings.admin_port, "admin_port")


def _bind_tcp(host: str, port: int, name: str) -> socket.socket:
    family, _, _, _, address = _address(host, port, name)
    bound = socket.socket(family, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    _bind(bound, address, name, port, host)
    return bound


def claim_grpc(settings: Settings) -> tuple[socket.socket | None, int]:
    """Check that no other program has the gRPC port. Returns a socket that keeps other programs off the port, and the port.

    Several workers bind this port with SO_REUSEPORT, which would also let them share it with an unrelated program. A first bind
    without that option finds a program that has the port already. The returned socket refuses it to programs that come later and
    do not set the option. With one worker no such socket is needed, and None is returned. Raises ConfigError.
    """
    family, _, _, _, address = _address(settings.host, settings.grpc_port, "grpc_port")
    with socket.socket(family, socket.SOCK_STREAM) as plain:
        plain.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        _bind(plain, address, "grpc_port", settings.grpc_port, settings.host)
        address = plain.getsockname()
    if settings.api_workers == 1:
        return None, address[1]
    claim = socket.socket(family, socket.SOCK_STREAM)
    claim.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    _bind(claim, address, "grpc_port", address[1], settings.host)
    return claim, address[1]


def _bind(sock: socket.socket, address: tuple[str, int], name: str, port: int, host: str) -> None:
    try:
        sock.bind(address)
    except OSError as error:
        sock.close()
        raise ConfigError(f"{name} is {port}, which cannot be bound on {host}: {error.strerror}", param=name) from None


def _address(host: str, port: int, port_name: str) -> tuple[int, int, int, str, tuple[str, int]]:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        name = "admin_host" if port_name == "admin_port" else "host"
        raise ConfigError(f"{name} is {host!r}, which is not an address of this machine: {error.strerror}", param=name) from None
    return found[0]  # type: ignore[return-value]


def socket_path(folder: Path) -> Path:
    """The path of the engine's Unix socket in the server's private folder. Raises ConfigError if no socket can have that path."""
    path = folder / "engine"
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise ConfigError(f"the temporary folder's path is not UTF-8: {str(folder)!r}; set TMPDIR to another folder") from None
    if len(os.fsencode(path)) > MAX_SOCKET_PATH:
        raise ConfigError(f"the temporary folder's path is too long for a socket: {folder}; set TMPDIR to a shorter one")
    return path
