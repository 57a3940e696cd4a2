"""Makes records and loads by hand for the tests of the load test."""

from array import array

from loadtest.record import Record
from loadtest.spec import Lengths, Load, Step


def record(events=(0.1,), *, tokens=None, output=None, sent=0.0, **fields):
    """Return an answered request whose events arrived `events` seconds after it was sent, with a token each."""
    tokens = [1] * len(events) if tokens is None else tokens
    values = {
        "index": 0,
        "step": 0,
        "slo_class": None,
        "slow": False,
        "at": sent,
        "sent": sent,
        "max_tokens": 10,
        "prompt_tokens": 10,
        "output_tokens": sum(tokens) if output is None else output,
        "e2e": events[-1] if events else 0.0,
        "events": array("f", events).tobytes(),
        "tokens": array("H", tokens).tobytes(),
    }
    return Record(**{**values, **fields})


def failed(outcome, status, **fields):
    return record((), outcome=outcome, status=status, **fields)


def load(**fields):
    shape = {} if {"steps", "trace", "concurrency", "sessions"} & set(fields) else {"steps": (Step(10, 10, 60),)}
    lengths = {"prompt": Lengths("fixed", 8, 8), "output": Lengths("fixed", 4, 4)}
    return Load(**{"seed": 1, **lengths, **shape, **fields})
