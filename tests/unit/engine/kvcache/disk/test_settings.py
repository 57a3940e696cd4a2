"""Tests the settings of the disk tier: a number out of its range is an error that names the field and the range."""

from pathlib import Path

import pytest

from engine.errors import ConfigError
from engine.kvcache.disk.settings import DiskSettings

NAN, INF = float("nan"), float("inf")


def make(**settings):
    return DiskSettings(folder=Path("kv"), max_bytes=1 << 30, **settings)


@pytest.mark.parametrize(
    ("field", "values", "what"),
    [
        *((name, (0, -1), "at least 1") for name in ("num_threads", "max_reads", "max_writes", "segment_bytes")),
        *((name, (0.0, -1.0, NAN, INF), "a number of seconds above 0") for name in ("slow_read", "retry", "inspect")),
        ("max_retry", (4.9, NAN, INF), r"at least retry \(5.0\)"),
        ("write_rate", (0.0, -1.0, NAN, INF), "a number of bytes/s above 0, or unset"),
        ("write_burst", (-1.0, NAN, INF), "a number of bytes, at least 0"),
    ],
)
def test_a_number_out_of_its_range_is_refused(field, values, what):
    for value in values:
        with pytest.raises(ConfigError, match=f"{field} .*is {value}: it must be .*{what}"):
            make(**{field: value})


def test_a_setting_of_the_operator_is_called_by_its_name_there():
    with pytest.raises(ConfigError, match=r"^cache\.disk_tier_write_rate is 0\.0") as refused:
        make(write_rate=0.0)
    assert refused.value.param == "cache.disk_tier_write_rate"


def test_the_smallest_numbers_are_accepted():
    make(num_threads=1, max_reads=1, max_writes=1, slow_read=1e-3, retry=1.0, max_retry=1.0, inspect=1e-3, write_burst=0.0)
