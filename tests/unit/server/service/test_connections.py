"""Tests of how a worker divides its file descriptors between HTTP and gRPC connections."""

import resource

import pytest

from engine.errors import ConfigError
from server.service.connections import ADMIN_CONNECTIONS, OWN_DESCRIPTORS, connection_limits
from server.settings import Settings


@pytest.fixture
def soft_limit():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield lambda number: resource.setrlimit(resource.RLIMIT_NOFILE, (number, hard))
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("limit", [20, 64, 100, 1024, 4096])
def test_all_connections_and_the_worker_itself_fit_into_the_limit(soft_limit, limit):
    soft_limit(limit)
    http, grpc = connection_limits(Settings())
    assert http >= 1
    assert grpc >= 1
    reserved = OWN_DESCRIPTORS + ADMIN_CONNECTIONS
    assert http + grpc + reserved == max(limit, reserved + 2)


def test_max_connections_leaves_grpc_the_rest(soft_limit):
    soft_limit(100)
    assert connection_limits(Settings(max_connections=33)) == (33, 11)
    assert connection_limits(Settings(max_connections=1)) == (1, 43)


def test_more_connections_than_the_limit_allows_are_refused_by_name(soft_limit):
    soft_limit(100)
    with pytest.raises(ConfigError, match=r"max_connections is 34.* only 100 files.* enough for 33.*ulimit -Hn") as caught:
        connection_limits(Settings(max_connections=34))
    assert caught.value.param == "max_connections"
