"""Runs the load test against a real server with the fake engine: each request ends once, and both sides count the same."""

import itertools
import json
import os
import signal
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from engine.config import CacheConfig
from loadtest.cli import app
from tests.support.children import ROOT, ServerChild, wait_until
from tests.support.serving import engine_running, metrics

SHORT = ["--seconds", "2", "--warm-up", "0", "--prompt", "uniform:10:60", "--output", "uniform:2:12"]
BLOCK = CacheConfig().block_size
ENDS = ("ok", "refused", "failed", "cancelled", "unfinished")


def run(*arguments, command="run", code=0):
    result = CliRunner().invoke(app, [command, *map(str, arguments)])
    assert result.exit_code == code, result.output
    return [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]


def raw(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def grown(server, before):
    """Return by how much the server's counters have grown since `before`, once no request runs."""
    wait_until(lambda: engine_running(server) == 0, "no request runs")
    return {name: value - before.get(name, 0.0) for name, value in metrics(server).items()}


def check_counts(line, records):
    assert line["sent"] == sum(line[end] for end in ENDS) == len(records) > 0
    assert len({(r["load"], r["index"], r["session"], r["turn"]) for r in records}) == len(records), "each request ends once"
    answered = [r for r in records if r["outcome"] == "ok"]
    assert all(r["output_tokens"] == r["max_tokens"] for r in answered), "answers have the planned length"
    assert line["output_tokens"] == sum(r["output_tokens"] for r in answered)


@pytest.mark.parametrize("route", ["generate", "completions", "chat", "grpc"])
def test_an_open_loop_ends_every_request_once_and_counts_the_servers_tokens(server, tmp_path, route):
    url = f"127.0.0.1:{server.grpc_port}" if route == "grpc" else server.url
    probes = {"generate": (1, 2), "completions": (1, 2), "chat": (2, 4), "grpc": (1, 2)}[route]  # requests and their tokens
    before = metrics(server)
    options = ["--route", route, "--rate", 20, *SHORT, "--slow", 0.2, "--slow-bytes", 100_000, "--seed", 3]
    (line,) = run(url, *options, "--raw", tmp_path / "raw.jsonl", "--record", tmp_path / "lines.jsonl")
    records = raw(tmp_path / "raw.jsonl")
    check_counts(line, records)
    assert line["ok"] == line["sent"]
    assert line["slow"] == sum(r["slow"] for r in records) > 0
    assert json.loads((tmp_path / "lines.jsonl").read_text()) == line
    found = grown(server, before)
    assert found["tidegate_requests_finished_total"] == line["sent"] + probes[0]
    assert found["tidegate_output_tokens_total"] == line["output_tokens"] + probes[1]
    assert all(r["counted"] for r in records), "the counts are the server's usage"


def test_a_closed_loop_of_two_processes_sends_the_planned_requests(server, tmp_path):
    options = ["--concurrency", 5, "--requests", 30, *SHORT, "--seconds", 60, "--procs", 2, "--raw", tmp_path / "raw.jsonl"]
    (line,) = run(server.url, *options)
    records = raw(tmp_path / "raw.jsonl")
    check_counts(line, records)
    assert sorted(r["index"] for r in records) == list(range(30))
    assert line["client"]["procs"] == len(line["client"]["cpu_shares"]) == 2


def test_sessions_send_the_whole_context_with_each_turn(server, tmp_path):
    shape = ["--sessions", 3, "--turns", 5, "--context", 600, "--think", 0, "--fork", 0.5, "--requests", 3]
    lengths = ["--seconds", 60, "--warm-up", 0, "--prompt", "uniform:20:60", "--output", "uniform:2:12"]
    (line,) = run(server.url, *shape, *lengths, "--seed", 4, "--raw", tmp_path / "raw.jsonl")
    records = raw(tmp_path / "raw.jsonl")
    check_counts(line, records)
    sessions = {}
    for record in sorted(records, key=lambda r: r["turn"]):
        sessions.setdefault(record["session"], []).append(record)
    whole = [turns for turns in sessions.values() if turns[0]["turn"] == 0]
    assert [len(turns) for turns in whole] == [5, 5, 5]
    assert len(sessions) > 3, "some turns forked"
    for turns in sessions.values():
        lengths = [r["prompt_tokens"] for r in turns]
        assert lengths == sorted(set(lengths)), "each context is longer than the one before"
    for turns in whole:
        for earlier, later in itertools.pairwise(turns):
            context = earlier["prompt_tokens"] + earlier["output_tokens"] - 1
            assert later["cached_tokens"] == context // BLOCK * BLOCK, "the answer's own tokens are in the next prompt"


def test_the_server_sees_cancellations(server, tmp_path):
    before = metrics(server)
    options = [
        "--rate",
        20,
        "--seconds",
        2,
        "--warm-up",
        0,
        "--prompt",
        "20",
        "--output",
        "400",
        "--cancel",
        1,
        "--cancel-after",
        0.2,
    ]
    for url, route in ((server.url, "generate"), (f"127.0.0.1:{server.grpc_port}", "grpc")):
        (line,) = run(url, "--route", route, *options, code=1)
        assert line["cancelled"] == line["sent"] > 0
        found = grown(server, before)
        assert found["tidegate_requests_aborted_total"] == line["sent"]
        before = metrics(server)


def test_refusals_are_counted_apart(tmp_path):
    with ServerChild(max_queue=2, max_num_seqs=2, fake_step_ms=20) as server:
        options = ["--seconds", 2, "--warm-up", 0, "--prompt", "20", "--output", "40", "--rate", 40]
        for url, route, status in (
            (server.url, "completions", "429 "),
            (f"127.0.0.1:{server.grpc_port}", "grpc", "RESOURCE_EXHAUSTED "),
        ):
            path = tmp_path / f"{route}.jsonl"
            (line,) = run(url, "--route", route, *options, "--raw", path)
            check_counts(line, raw(path))
            assert line["refused"] > line["ok"] > 0
            assert line["failed"] == 0
            assert list(line["errors"].values()) == [line["refused"]]
            assert next(iter(line["errors"])).startswith(status)
            assert line["refusal_ms"] is not None
            assert line["retry_after_s"]["p50"] >= 1


def test_ctrl_c_keeps_the_results_so_far(server, tmp_path):
    path = tmp_path / "lines.jsonl"
    options = [
        "--rate",
        "20,20",
        "--seconds",
        "500",
        "--warm-up",
        "0",
        "--prompt",
        "20",
        "--output",
        "300",
        "--record",
        str(path),
    ]
    # A shell that starts the tests in the background would have them, and all that they start, ignore this signal.
    command = ["env", "--default-signal=INT", sys.executable, "-m", "loadtest", "run", server.url, *options]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, process_group=0)
    wait_until(lambda: (engine_running(server) or 0) >= 5, "the load runs")
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all processes of the load test
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    (line,) = map(json.loads, path.read_text().splitlines())
    assert json.loads(out) == line
    assert line["interrupted"] is True
    assert line["sent"] == sum(line[end] for end in ENDS)
    assert line["unfinished"] > 0
    assert "interrupted: the figures end there" in err


def test_compare_measures_both_in_turns(server, tmp_path):
    options = ["--rounds", 2, "--rate", 20, *SHORT, "--raw", tmp_path / "raw.jsonl"]
    (line,) = run(server.url, f"127.0.0.1:{server.grpc_port}", "--route-b", "grpc", *options, command="compare")
    assert line["rounds"] == 2
    assert (line["a"]["route"], line["b"]["route"]) == ("completions", "grpc")
    assert line["requests"]["a"] == line["requests"]["b"], "both get the same load"
    ratio = line["ratios"]["ttft_ms p50"]
    assert 0 < ratio["least"] <= ratio["ratio"] <= ratio["greatest"]
    loads = [record["load"] for record in raw(tmp_path / "raw.jsonl")]
    turns = [number for i, number in enumerate(loads) if i == 0 or number != loads[i - 1]]
    assert turns == [0, 1], "round by round"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rate", "5", "--shape", "long"], "takes 4096; choose shorter lengths"),
        (["--rate", "5", "--prompt", "20", "--vocab", "10000"], "name the model's number of ids with --vocab"),
        (["--rate", "5", "--prompt", "20", "--output", "9", "--model", "gpt"], "has no model 'gpt': it has tidepool"),
        (["--rate", "5", "--prompt", "20", "--output", "9", "--metrics", "http://127.0.0.1:1/metrics"], "cannot be read"),
    ],
)
def test_a_load_that_cannot_work_is_refused_before_it_starts(server, options, message):
    result = CliRunner().invoke(app, ["run", server.url, *options])
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())
