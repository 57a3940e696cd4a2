"""Tests that traces and files of lengths are read, and that a torn line is named by file, number and key."""

import pytest

from loadtest.flags import Flags, loads_of
from loadtest.plan import WARM_UP, Plan
from loadtest.spec import LoadError, TraceRow
from loadtest.trace import read_lengths, read_trace

GOOD = '{"at": 1.5, "prompt_tokens": 10, "output_tokens": 5, "slo_class": "batch"}\n'


def test_rows_come_in_order_of_time(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text(GOOD + "\n" + '{"at": 0, "prompt_tokens": 7, "output_tokens": 1}\n')
    assert read_trace(path) == (TraceRow(0.0, 7, 1, None), TraceRow(1.5, 10, 5, "batch"))
    assert read_trace(path, speed=3)[1].at == 0.5


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"at": 1, "prompt_tokens": 10', "line 2: "),
        ('{"prompt_tokens": 10, "output_tokens": 5}', "line 2: Object missing required field `at`"),
        ('{"at": "x", "prompt_tokens": 10, "output_tokens": 5}', "line 2: at: Expected `float`, got `str`"),
        ('{"at": -1, "prompt_tokens": 10, "output_tokens": 5}', "line 2: at: Expected `float` >= 0"),
        ('{"at": 1, "prompt_tokens": 0, "output_tokens": 5}', "line 2: prompt_tokens: Expected `int` >= 1"),
        (
            '{"at": 1, "prompt_tokens": 1, "output_tokens": 5, "slo_class": "gold"}',
            "line 2: slo_class: Invalid enum value 'gold'",
        ),
        ('{"at": 1, "prompt_tokens": 1, "output_tokens": 5, "user": 3}', "line 2: Object contains unknown field `user`"),
        ("[1, 2]", "line 2: Expected `object`, got `array`"),
    ],
)
def test_a_torn_line_is_named(tmp_path, line, message):
    path = tmp_path / "t.jsonl"
    path.write_text(GOOD + line + "\n")
    with pytest.raises(LoadError) as refused:
        read_trace(path)
    assert f"{path} {message}" in str(refused.value)
    assert "at, prompt_tokens, output_tokens" in str(refused.value)


def test_missing_and_empty_files_are_named(tmp_path):
    with pytest.raises(LoadError, match="No such file"):
        read_trace(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(LoadError, match="has no line"):
        read_lengths(tmp_path / "empty.jsonl")


def test_the_plan_of_a_trace_is_the_trace(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text('{"at": 0.5, "prompt_tokens": 7, "output_tokens": 1}\n' + GOOD)
    (load,) = loads_of(Flags(trace=path, slo_class="standard", warm_up=1.0))
    orders = Plan(load).open_loop()
    assert [(o.at, o.prompt_tokens, o.output_tokens, o.slo_class, o.step) for o in orders] == [
        (-0.5, 7, 1, "standard", WARM_UP),
        (0.5, 10, 5, "batch", 0),
    ]
    with pytest.raises(LoadError, match="nothing is left after --warm-up 2"):
        loads_of(Flags(trace=path, warm_up=2.0))


def test_pairs_of_lengths_are_drawn_together(tmp_path):
    path = tmp_path / "l.jsonl"
    path.write_text('{"prompt_tokens": 10, "output_tokens": 1}\n{"prompt_tokens": 20, "output_tokens": 2}\n')
    (load,) = loads_of(Flags(rate="50", seconds=4, lengths=path))
    assert {(o.prompt_tokens, o.output_tokens) for o in Plan(load).open_loop()} == {(10, 1), (20, 2)}
    with pytest.raises(LoadError, match="--prompt or --lengths"):
        loads_of(Flags(rate="50", lengths=path, prompt="5"))
