"""The workloads' tokens are fixed: figures of other engines were measured on the same ones."""

import json

import pytest
import xxhash

from engine.errors import ConfigError
from server import bench

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
    monkeypatch.setitem(bench.WORKLOADS, "small", lambda: bench.fixed(3, 5, 7, vocab=60))
    bench.offline(str(tmp_path), "small", load_format="dummy", device="cpu")
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    required = "date commit device engine model precision workload seconds out_tok_s total_tok_s startup_s bound_share command"
    assert required.split() == list(line)[:13]
    assert (line["num_requests"], line["prompt_tokens"], line["output_tokens"]) == (3, 15, 21)
    assert (line["precision"], line["workload"]) == ("float32", "small")
