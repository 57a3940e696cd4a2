"""Tests of the ports that the supervisor binds, and of the errors that name the setting of a port that cannot be bound."""

import os
import socket
from pathlib import Path

import pytest

from engine.errors import ConfigError
from server.settings import Settings
from server.supervise.sockets import bind_admin, bind_http, socket_path

PORTS = [(bind_http, "host", "port"), (bind_admin, "admin_host", "admin_port")]


@pytest.fixture(params=PORTS, ids=["http", "admin"])
def kind(request):
    return request.param


def test_port_0_binds_a_free_port_on_the_address_of_the_setting(kind):
    bind, host, port = kind
    with bind(Settings(**{host: "127.0.0.1", port: 0})) as bound:
        address, number = bound.getsockname()
        assert address == "127.0.0.1"
        assert number > 0


def test_a_port_that_another_program_has_is_refused_by_name(kind):
    bind, host, port = kind
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = other.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"^{port} is {taken}, which cannot be bound on 127\.0\.0\.1: ") as caught:
            bind(Settings(**{host: "127.0.0.1", port: taken}))
        assert caught.value.param == port


@pytest.mark.parametrize("address", ["192.0.2.1", "not an address"])
def test_an_address_that_this_machine_does_not_have_is_refused_by_name(kind, address):
    bind, host, port = kind
    with pytest.raises(ConfigError) as caught:
        bind(Settings(**{host: address, port: 0}))
    assert caught.value.param in (host, port)
    assert address in caught.value.message


def test_the_admin_port_is_on_the_loopback_address_by_default():
    assert Settings().admin_host == "127.0.0.1"
    assert Settings(host="0.0.0.0").admin_host == "127.0.0.1"


@pytest.mark.parametrize(("name", "reason"), [(b"x" * 200, "too long for a socket"), (b"x\xff", "not UTF-8")])
def test_a_folder_whose_path_no_socket_can_have_is_refused_in_one_sentence(tmp_path, name, reason):
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name))
    with pytest.raises(ConfigError, match=reason) as caught:
        socket_path(folder)
    caught.value.message.encode()  # the log can write it
