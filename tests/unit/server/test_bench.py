"""The workloads' tokens are fixed: figures of other engines were measured on the same ones."""

import json

import pytest
import xxhash

from engine.errors import ConfigError
from server import bench
from server.settings import Settings
from tests.support.tiny_checkpoint import write_tiny_checkpoint

# (requests, output tokens, hash), of the list that the peers' figures were measured on.
DIGESTS = {
    "mixed256": (256, 133966, "fe3d947c79f3af74"),
    "mixed1024": (1024, 583802, "01e3181abfa454d6"),
    "single": (1, 256, "9832718f38d19c73"),
    "decode64": (64, 16384, "0cf3351bd79019c5"),
    "prefill": (32, 32, "17a10d23b5972551"),
}


def digest(work):
    data = json.dumps([[w.prompt, w.num_outputs] for w in work]).encode()
    return len(work), sum(w.num_outputs for w in work), xxhash.xxh3_64_hexdigest(data)


@pytest.mark.parametrize("name", sorted(bench.WORKLOADS))
def test_workloads_do_not_change(name):
    assert digest(bench.build_workload(name)) == DIGESTS[name]


def test_an_unknown_workload_is_an_error():
    with pytest.raises(ConfigError, match="single, decode64"):
        bench.build_workload("double")


@pytest.mark.torch
def test_offline_prints_its_line_last_from_a_folder_with_only_a_config(tmp_path, capsys, monkeypatch):
    """Dummy weights, real runner, a workload small enough for a test."""
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
    monkeypatch.setitem(bench.WORKLOADS, "small", lambda vocab: bench.fixed(3, 5, 7, vocab=vocab))
    settings = Settings(model=str(tmp_path), load_format="dummy", device="cpu")
    bench.offline(settings, "small", rounds=2)
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    required = "date commit device engine model precision workload seconds out_tok_s total_tok_s startup_s bound_share command"
    assert required.split() == list(line)[:13]
    assert (line["num_requests"], line["prompt_tokens"], line["output_tokens"]) == (3, 15, 21)
    assert (line["precision"], line["workload"]) == ("float32", "small")
    assert len(line["rounds"]) == 2
    assert line["seconds"] == min(line["rounds"])


@pytest.mark.parametrize("vocab_size", [10_001, 32_000, 151_936])
def test_every_larger_vocabulary_draws_the_same(vocab_size):
    assert digest(bench.build_workload("decode64", vocab_size)) == DIGESTS["decode64"]


@pytest.mark.parametrize("vocab_size", [1, 512, 10_000])
def test_a_smaller_vocabulary_draws_ids_that_it_has(vocab_size):
    ids = {id for work in bench.build_workload("decode64", vocab_size) for id in work.prompt}
    assert min(ids) >= 0
    assert max(ids) < vocab_size


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    return str(write_tiny_checkpoint(tmp_path_factory.mktemp("demo")))


@pytest.mark.parametrize(
    ("options", "workload", "message"),
    [
        ({}, "prefill", "prefill takes a context of 8193 tokens, and the model has 4096: choose one that fits .single, decode64"),
        ({"max_model_len": 100}, "single", "max_model_len is 100, but workload single takes 1280 tokens: set it to 1280 or more"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_loaded(demo, monkeypatch, options, workload, message):
    monkeypatch.setattr(bench, "LLM", None)
    with pytest.raises(ConfigError, match=message):
        bench.offline(Settings(model=demo, **options), workload)


def test_no_rounds_at_all_are_refused(demo):
    with pytest.raises(ConfigError, match="rounds is 0"):
        bench.offline(Settings(model=demo), "single", rounds=0)


@pytest.mark.parametrize(("num", "rows"), [(1, 256), (64, 256), (256, 256), (1024, 256), (64, 16)])
def test_the_warm_up_meets_every_size_of_batch_that_graphs_are_captured_for(num, rows):
    work = bench.fixed(num, 16, 256)
    (longest,), at_once = bench.warm_up_of(work, rows)
    assert longest.prompt == work[0].prompt
    most = min(num, rows)
    assert len(at_once) == most
    left = [sum(w.num_outputs > step for w in at_once) for step in range(max(w.num_outputs for w in at_once))]
    sizes = [size for size in (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256) if size < most] + [most]
    met = {min(size for size in sizes if size >= now) for now in left}
    assert met == set(sizes)
