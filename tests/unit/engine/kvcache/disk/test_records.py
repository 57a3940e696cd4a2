"""Tests the record format: any change of any byte of a record is noticed, and nobody else's record is taken for ours."""

import random
import sys
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import ConfigError
from engine.kvcache.disk.outcome import Outcome
from engine.kvcache.disk.records import HEADER_BYTES, PAGE, Header, RecordFormat

KEY = bytes(range(32))
DIGEST = b"d" * 16
FAMILY = b"f" * 16
PAYLOAD = bytes(range(256)) * 20
FORMAT = RecordFormat(len(PAYLOAD), b"llama, bf16", KEY)


def encoded(form=FORMAT, digest=DIGEST, payload=PAYLOAD, stamp=7):
    return form.encode(digest, FAMILY, stamp, memoryview(payload)).ljust(PAGE, b"\0")


def verified(page, payload=PAYLOAD, digest=DIGEST, form=FORMAT):
    return form.verify(memoryview(page), digest, memoryview(payload))


def test_a_record_that_did_not_change_is_right():
    assert verified(encoded()) is Outcome.OK
    header = FORMAT.decode(memoryview(encoded()))
    assert isinstance(header, Header)
    assert (header.digest, header.family, header.stamp) == (DIGEST, FAMILY, 7)


def test_a_header_with_any_bit_flipped_is_not_right():
    for bit in range(8 * HEADER_BYTES):
        page = bytearray(encoded())
        page[bit // 8] ^= 1 << bit % 8
        assert verified(page) in (Outcome.FOREIGN, Outcome.CORRUPT)


@given(st.integers(0, 8 * len(PAYLOAD) - 1))
def test_a_payload_with_any_bit_flipped_is_corrupt(bit):
    payload = bytearray(PAYLOAD)
    payload[bit // 8] ^= 1 << bit % 8
    assert verified(encoded(), payload) is Outcome.CORRUPT


@given(st.integers(0, HEADER_BYTES - 1), st.integers(0, len(PAYLOAD) - 1))
def test_a_record_that_was_written_in_part_is_not_right(header_bytes, payload_bytes):
    """The rest is what lay there before: the record of another digest."""
    other = bytes(reversed(PAYLOAD))
    old = encoded(digest=b"o" * 16, payload=other, stamp=6)
    assert verified(encoded()[:header_bytes] + old[header_bytes:], other) is not Outcome.OK
    assert verified(encoded(), PAYLOAD[:payload_bytes] + other[payload_bytes:]) in (Outcome.CORRUPT, Outcome.OK)
    if payload_bytes < len(PAYLOAD) - 1:
        assert verified(encoded(), PAYLOAD[:payload_bytes] + other[payload_bytes:]) is Outcome.CORRUPT


@given(st.binary(max_size=HEADER_BYTES), st.integers(0, 1 << 32))
def test_random_bytes_are_never_a_record(begin, seed):
    page = begin + random.Random(seed).randbytes(PAGE - len(begin))
    assert verified(page) in (Outcome.EMPTY, Outcome.CORRUPT, Outcome.FOREIGN)


def test_an_empty_slot_is_not_called_corrupt():
    assert verified(bytes(PAGE)) is Outcome.EMPTY


@pytest.mark.parametrize(
    "other",
    [
        RecordFormat(len(PAYLOAD), b"llama, fp8", KEY),
        RecordFormat(len(PAYLOAD), b"llama, bf16", bytes(32)),
        RecordFormat(len(PAYLOAD) + 1, b"llama, bf16", KEY),
    ],
    ids=["fingerprint", "key", "size"],
)
def test_a_record_of_another_format_or_key_is_foreign(other):
    page = encoded(other, payload=PAYLOAD + bytes(other.payload_bytes - len(PAYLOAD)))
    assert FORMAT.decode(memoryview(page)) is Outcome.FOREIGN


def test_a_record_of_another_version_is_foreign():
    page = bytearray(encoded())
    page[8] += 1
    assert FORMAT.decode(memoryview(page)) is Outcome.FOREIGN


def test_the_record_of_another_digest_is_not_given_out():
    assert verified(encoded(digest=b"e" * 16)) is Outcome.OTHER


@pytest.mark.parametrize(
    ("num_bytes", "key", "param"), [(0, KEY, None), (2 << 30, KEY, None), (10, b"short", "cache.disk_tier_key_file")]
)
def test_a_size_or_key_that_cannot_be_used_is_refused(num_bytes, key, param):
    with pytest.raises(ConfigError) as refused:
        RecordFormat(num_bytes, b"", key)
    assert refused.value.param == param


def test_other_threads_run_while_a_payload_is_summed():
    """With so long a switch interval, this thread runs during the sum only if the sum gives up the interpreter lock."""
    payload = memoryview(bytes(64 << 20))
    form = RecordFormat(len(payload), b"", KEY)
    is_summing = threading.Event()
    interval = sys.getswitchinterval()

    def work():
        is_summing.set()
        form.encode(DIGEST, FAMILY, 1, payload)
        is_summing.clear()

    thread = threading.Thread(target=work)
    sys.setswitchinterval(1000.0)
    try:
        thread.start()
        seen = False
        while thread.is_alive():
            seen = seen or is_summing.is_set()
            time.sleep(0)
    finally:
        sys.setswitchinterval(interval)
    assert seen
