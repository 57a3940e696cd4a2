"""Tests what a measurement is turned into: the JSON line, the tables, the page, and the ratios of a comparison."""

import io
import json
import re
import sys

import msgspec
import pytest
from rich.console import Console

from loadtest.compare import ratios, with_one_vocabulary
from loadtest.figures import whole
from loadtest.line import About, command, limits_of, line_of, write_line
from loadtest.measure import Measurement, State
from loadtest.options import slo
from loadtest.page import write_page
from loadtest.progress import text_of
from loadtest.run import Output, write_raw
from loadtest.scrape import Sample, values_of
from loadtest.spec import LoadError, Step, Target
from loadtest.table import show
from tests.unit.loadtest.samples import failed, load, record

SLOS = [slo("ttft=500,gap=50"), slo("e2e=900")]
ABOUT = About(device="a card", precision="bfloat16", shape="chat", tag="x")
FIRST_KEYS = ["date", "commit", "device", "engine", "model", "precision", "workload", "seconds", "out_tok_s", "total_tok_s"]


def measurement(**fields):
    shape = load(steps=(Step(1, 1, 5), Step(2, 2, 5)), warm_up=1.0)
    records = [
        record((0.1, 0.13, 0.2), sent=1.0),
        record((0.2, 0.21), sent=6.0, step=1),
        failed("failed", "500 x", step=1, at=7.0),
    ]
    records.append(record((0.1, 0.2), sent=-0.5, step=-1))
    values = {"sequences limit": 8.0, "tokens limit": 512.0, "running": 3.0}
    values |= {"policy: aimd": 1.0, "changes: slow": 2.0}
    samples = [Sample(at, {**values, "sequences limit": seqs}) for at, seqs in ((-0.5, 1.0), (0.5, 8.0), (1.5, 16.0), (2.5, 8.0))]
    samples[-1].values.update({"changes: slow": 5.0, "changes: waiting": 1.0})
    target = Target("http://host:1", "generate", model="m", is_tidegate=True)
    given = {"records": records, "samples": samples, "scrape_failures": 1, "loop_lags": [0.001, 0.002], "cpu_shares": [0.25]}
    return Measurement(load=shape, target=target, wall_s=10.5, **{**given, **fields})


def test_the_line_has_the_keys_of_all_benchmark_lines_first():
    line = json.loads(json.dumps(line_of(measurement(), SLOS, ABOUT)))
    assert list(line)[: len(FIRST_KEYS)] == FIRST_KEYS
    assert list(line)[-1] == "command"
    assert (line["engine"], line["device"], line["precision"], line["tag"]) == ("tidegate", "a card", "bfloat16", "x")
    assert line["workload"] == "chat open 1 to 2/s in 2 steps"
    assert (line["sent"], line["ok"], line["failed"], line["errors"]) == (3, 2, 1, {"500 x": 1})
    assert line["goodput"] == {"ttft=500,gap=50": 0.1, "e2e=900": 0.2}
    assert [(s["name"], s["sent"], s["goodput"]["e2e=900"]) for s in line["steps"]] == [("1/s", 1, 0.2), ("2/s", 2, 0.2)]
    client = {"procs": 1, "cpu_shares": [0.25], "loop_lag_max_ms": 2.0}
    assert client.items() <= line["client"].items()


def test_limits_are_those_of_the_window_and_a_missing_series_is_named():
    limits = limits_of(measurement())
    assert limits["sequences limit"] == {"first": 8.0, "last": 8.0, "min": 8.0, "max": 16.0, "changes": 2}
    assert limits["chunk limit"] == "the server has no series tidegate_engine_batch_chunk_limit"
    assert limits["server's changes"] == {"slow": 3.0, "waiting": 1.0}
    assert limits["policies"] == ["aimd"]
    assert limits_of(measurement(scrape_failures=None)) is None
    assert limits_of(measurement(samples=[]))["samples"] == 0


def test_the_known_series_are_read_from_the_servers_text():
    text = """# TYPE tidegate_engine_batch_tokens_limit gauge
tidegate_engine_batch_tokens_limit 512.0
# TYPE tidegate_engine_limit_changes counter
tidegate_engine_limit_changes_total{reason="slow"} 2.0
# TYPE tidegate_engine_batching_policy gauge
tidegate_engine_batching_policy{policy="aimd"} 1.0
# TYPE tidegate_engine_steps counter
tidegate_engine_steps_total 9.0
"""
    assert values_of(text) == {"tokens limit": 512.0, "changes: slow": 2.0, "policy: aimd": 1.0}
    assert values_of("") == {}


def test_the_command_does_not_show_keys(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["x", "run", "URL", "--api-key", "secret", "--api-key-b=secret", "--tag", "a b"])
    assert command() == "python -m loadtest run URL --api-key '***' '--api-key-b=***' --tag 'a b'"


def test_a_line_is_printed_and_appended(tmp_path, capsys):
    path = tmp_path / "r.jsonl"
    write_line({"a": 1}, path)
    write_line({"a": 2}, path)
    assert capsys.readouterr().out == path.read_text() == '{"a": 1}\n{"a": 2}\n'


def shown(found):
    console = Console(file=io.StringIO(), width=120)
    show(found, SLOS, ABOUT, console)
    return console.file.getvalue()


def test_the_tables_have_a_row_for_each_step_and_remarks_below():
    text = shown(measurement())
    assert re.search(r"^1/s +1 +1 +0 +0 +0 ", text, re.M)
    assert re.search(r"^2/s +2 +1 +0 +1 +0 ", text, re.M)
    assert re.search(r"^TTFT +100 +200 +200 +200$", text, re.M)
    assert re.search(r"^e2e=900 +0\.20 +66\.7%$", text, re.M)
    assert "2/s: 1 of 2 requests: 500 x" in text
    assert "sequences limit: 8 to 16, 2 changes seen, 8 at the end" in text
    assert "the server has no series tidegate_engine_batch_chunk_limit" in text
    assert "batching policy: aimd; the server counted changes of limits: 3 for slow, 1 for waiting" in text
    assert "use more --procs" not in text


def test_the_tables_say_when_the_load_test_itself_was_late_or_the_prompts_were_not_fresh():
    late = shown(measurement(loop_lags=[0.2]))
    assert "event loop 200.0 ms late (P99)" in late
    assert "use more --procs" in late
    cached = shown(measurement(records=[record(prompt_tokens=10, cached_tokens=9)]))
    assert "90% of the prompt tokens were in the server's prefix cache" in cached
    assert "interrupted: the figures end there" in shown(measurement(interrupted=True))
    assert "not whole: it broke" in shown(measurement(problem="it broke"))


def test_the_page_is_one_file_that_needs_nothing_else(tmp_path):
    path = tmp_path / "p.html"
    write_page([measurement()], SLOS, ABOUT, path)
    text = path.read_text()
    assert 'src="data:image/png;base64,' in text
    assert "http" not in re.sub(r"base64,[^\"]*", "", text)
    assert text.count("<tr>") == 3
    write_page([measurement(records=[], samples=[], scrape_failures=None)], SLOS, ABOUT, tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_a_page_must_be_html_or_png(tmp_path):
    with pytest.raises(LoadError, match=r"must end with .html or .png"):
        Output(page=tmp_path / "p.pdf").check()
    with pytest.raises(LoadError, match="cannot be written"):
        Output(record=tmp_path / "none" / "r.jsonl").check()


def test_raw_results_have_a_line_for_each_request(tmp_path):
    path = tmp_path / "raw.jsonl"
    write_raw(measurement(), path)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["outcome"] for line in lines] == ["ok", "ok", "failed", "ok"]
    assert lines[0]["events"] == [0.1, 0.13, 0.2]


def test_the_progress_names_the_step_and_the_phase():
    def at(seconds):
        return text_of(State(measurement(), at=seconds, sent=4, running=2), "chat")

    assert at(-0.5).startswith("chat: warm-up of 10 s")
    assert "3 s of 10 s, step 1 of 2: 1/s; 4 sent, 2 running, 1 refused or failed" in at(3)
    assert "step 2 of 2: 2/s" in at(7)
    assert "draining" in at(11)


def figures(ttft, speed):
    events = (ttft, ttft + 1 / speed)
    return whole(measurement(records=[record(events)]), SLOS)


def test_ratios_are_b_over_a_round_by_round():
    pairs = [(figures(0.1, 10), figures(0.2, 10)), (figures(0.2, 10), figures(0.2, 5)), (figures(0.1, 10), figures(0.15, 10))]
    found = ratios(pairs)
    ttft = found["ttft_ms p50"]
    assert msgspec.structs.astuple(ttft) == pytest.approx((100, 200, 1.5, 1.0, 2.0), rel=1e-3)
    assert msgspec.structs.astuple(found["user_tok_s"]) == pytest.approx((10, 10, 1.0, 0.5, 1.0), rel=1e-3)
    assert "goodput ttft=500,gap=50" not in found, "0 has no ratio"
    assert ratios([]) == {}


def test_both_sides_of_a_comparison_get_prompts_of_the_same_token_ids():
    targets = with_one_vocabulary([Target("http://a", "generate", vocab=900), Target("http://b", "generate", vocab=500)])
    assert [(target.url, target.vocab) for target in targets] == [("http://a", 500), ("http://b", 500)]


def test_a_figure_that_a_round_lacks_has_no_ratio():
    good, none = figures(0.1, 10), whole(measurement(records=[failed("failed", "500")]), SLOS)
    assert "ttft_ms p50" not in ratios([(good, good), (good, none)])
    assert "ttft_ms p50" in ratios([(good, good)])
