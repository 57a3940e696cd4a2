"""Tests of HostMemory: the records of its slots lie apart, and a size that the system does not give is refused by name."""

import pytest

from engine.errors import ConfigError
from engine.kvcache.host_memory import HostMemory


def test_each_slot_has_a_record_of_its_own():
    memory = HostMemory(3, 5)
    for slot in range(3):
        memory.record(slot)[:] = bytes([slot + 1]) * 5
    assert bytes(memory.bytes) == b"\1\1\1\1\1\2\2\2\2\2\3\3\3\3\3"


def test_records_begin_at_multiples_of_the_stride():
    memory = HostMemory(2, 5, 8)
    memory.record(1)[:] = b"12345"
    assert bytes(memory.bytes) == bytes(8) + b"12345" + bytes(3)
    assert len(memory.record(1)) == 5


@pytest.mark.parametrize("slots", [1 << 40, 1 << 80], ids=["more than there is", "more than can be said"])
def test_too_much_memory_is_refused(slots):
    with pytest.raises(ConfigError, match=r"too large: the system does not give .* GiB of host memory\. Set a smaller") as error:
        HostMemory(slots, 1 << 20)
    assert error.value.param == "cache.host_tier_bytes"
