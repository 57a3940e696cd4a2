"""Tests the table and the JSON lines of `tidegate bench offline`, and the arguments that it refuses."""

import json

import pytest

from engine.config import ModelLimits
from engine.errors import ConfigError
from engine.messages import EngineInfo
from engine.models.families import read_spec
from engine.startup import PHASES
from server import bench
from server.bench import bounds, lines, offline
from server.settings import Settings
from tests.support.tiny_checkpoint import write_tiny_checkpoint

REQUIRED = "date commit device engine model precision workload seconds out_tok_s total_tok_s startup_s bound_share command"


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    return str(write_tiny_checkpoint(tmp_path_factory.mktemp("demo")))


@pytest.fixture
def small(monkeypatch):
    """Replace the default workloads by two workloads that are small enough for a test."""
    monkeypatch.setitem(bench.WORKLOADS, "small", lambda vocab: bench.fixed(3, 5, 7, vocab=vocab))
    monkeypatch.setitem(bench.WORKLOADS, "longer", lambda vocab: bench.fixed(2, 40, 3, vocab=vocab))
    monkeypatch.setattr(offline, "DEFAULT", ("small", "longer"))


@pytest.mark.torch
def test_a_folder_with_only_a_config_runs_with_dummy_weights(tmp_path, capsys, small):
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 64,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 128,
        "hidden_act": "silu",
        "eos_token_id": 1,
        "torch_dtype": "bfloat16",
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    offline.run([Settings(model=str(tmp_path), load_format="dummy", device="cpu")], ["small"], rounds=2)
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert REQUIRED.split() == list(line)[:13]
    assert (line["num_requests"], line["prompt_tokens"], line["output_tokens"]) == (3, 15, 21)
    assert (line["precision"], line["workload"]) == ("float32", "small")
    assert len(line["rounds"]) == 2
    assert line["seconds"] == min(line["rounds"])
    assert list(line["startup"]) == list(PHASES)
    assert line["startup_s"] == pytest.approx(sum(line["startup"].values()), abs=0.02)
    assert line["bound_share"] is None


def test_each_model_and_workload_gives_a_row_and_a_line(demo, tmp_path, capsys, small):
    other = str(write_tiny_checkpoint(tmp_path / "other"))
    record = tmp_path / "lines.jsonl"
    record.write_text("{}\n")
    settings = [Settings(model=model, runner="fake") for model in (demo, other)]
    offline.run(settings, rounds=2, record=record)
    out, err = capsys.readouterr()
    found = [json.loads(line) for line in out.splitlines()]
    pairs = [(model.rpartition("/")[2], workload) for model in (demo, other) for workload in ("small", "longer")]
    assert [(line["model"], line["workload"]) for line in found] == pairs
    assert record.read_text() == "{}\n" + out
    rows = [line.split() for line in err.splitlines()]
    assert [
        (row[0], row[1]) for row in rows if row[:1] and row[0] in ("other", demo.rpartition("/")[2]) and row[1] != "on"
    ] == pairs
    first, second = found[0]["startup"]["imports"], found[2]["startup"]["imports"]
    assert second < first, "only the first engine's start includes the start of the process"


def test_a_line_is_printed_before_the_next_workload_runs(demo, capsys, monkeypatch, small):
    seen = []
    run_round = offline._run_round

    def watched(llm, work, name, console):
        seen.append((name, capsys.readouterr().out.count("\n")))
        return run_round(llm, work, name, console)

    monkeypatch.setattr(offline, "_run_round", watched)
    offline.run([Settings(model=demo, runner="fake")], rounds=1)
    assert seen == [("small", 0), ("longer", 1)]


def test_an_engine_has_the_context_of_its_longest_workload(demo, monkeypatch, small):
    built = []

    class Kept(offline.LLM):
        def __init__(self, **options):
            built.append(options["max_model_len"])
            super().__init__(**options)

    monkeypatch.setattr(offline, "LLM", Kept)
    offline.run([Settings(model=demo, runner="fake")], ["longer", "small"], rounds=1)
    assert built == [43]


def test_default_workloads_that_do_not_fit_are_left_out(demo, capsys, small):
    found = offline.run([Settings(model=demo, runner="fake", max_model_len=20)], rounds=1)
    assert [line.workload for line in found] == ["small"]
    assert "longer is left out, it needs a context of 43 tokens" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "workload", "message"),
    [
        ({}, "prefill", "prefill needs a context of 8193 tokens, and the model has 4096: choose one that fits .single, decode64"),
        ({"max_model_len": 100}, "single", "max_model_len is 100, but workload single needs 1280 tokens: set it to 1280 or more"),
        ({}, "double", "workload is 'double': it must be one of single, decode64"),
    ],
)
def test_a_named_workload_that_does_not_fit_is_refused_before_a_model_is_loaded(demo, monkeypatch, options, workload, message):
    monkeypatch.setattr(offline, "LLM", None)
    with pytest.raises(ConfigError, match=message):
        offline.run([Settings(model=demo, **options)], [workload])


def test_zero_rounds_are_refused(demo):
    with pytest.raises(ConfigError, match="rounds is 0"):
        offline.run([Settings(model=demo)], ["single"], rounds=0)


def test_a_record_that_cannot_be_written_is_refused_before_a_measurement(demo, tmp_path):
    with pytest.raises(ConfigError, match=r"record is .*nowhere"):
        offline.run([Settings(model=demo)], ["single"], record=tmp_path / "nowhere" / "lines.jsonl")


def test_the_share_of_the_bound_where_the_hardware_is_known(demo):
    spec, work = read_spec(demo), bench.fixed(3, 5, 7)
    hardware = bounds.Hardware(1e9, 1e12)

    class Engine:
        info = EngineInfo(
            model="demo",
            limits=ModelLimits(max_model_len=64, vocab_size=64, eos_token_ids=(), dtype="bfloat16"),
            block_size=16,
            num_blocks=1,
            max_num_seqs=8,
            max_step_tokens=20,
            device="a GPU",
            pid=1,
        )

    job = offline._Job(Settings(model=demo), Settings(model=demo).engine_config(), spec, {"small": work})
    bound = bounds.workload_seconds(spec, [bounds.Length(5, 7)] * 3, hardware, number_size=2, max_tokens=20, max_rows=8)
    measured = offline._Measured([offline._Round(4 * bound, 7, 0.0), offline._Round(8 * bound, 7, 0.0)], 0.0)
    line = offline._line(job, "small", offline._Engine(Engine(), {"imports": 1.0}, hardware), measured)
    assert isinstance(line, lines.OfflineLine)
    assert (line.bound_share, line.bandwidth, line.rate, line.startup_s) == (0.25, 1e9, 1e12, 1.0)
    assert "25%" in offline._row(line)
