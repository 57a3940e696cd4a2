"""Tests that complete checkpoints load, and that the error for a broken checkpoint names the tensor and the file."""

from __future__ import annotations

import json
import re

import msgspec
import pytest
import torch
from paged import PagedRun, random_sequences
from reference import VOCAB, make, reference_logits
from safetensors.torch import load_file, save_file

from engine.errors import CheckpointError
from engine.models import registry
from engine.models.families import read_spec
from engine.weights import dummy, files, loader

FILE = "model.safetensors"


def build(folder, dtype=torch.float32) -> registry.Model:
    return registry.build(read_spec(folder), dtype=dtype, device=torch.device("cpu"))


def load(folder) -> registry.Model:
    model = build(folder)
    loader.load(model, folder)
    return model


@pytest.fixture
def checkpoint(tmp_path):
    make("llama", tmp_path)
    return tmp_path


def rewrite(folder, change):
    tensors = load_file(folder / FILE)
    change(tensors)
    save_file(tensors, folder / FILE)


def refused(folder, *words: str):
    with pytest.raises(CheckpointError) as error:
        load(folder)
    for word in words:
        assert word in error.value.message, error.value.message


def test_heads_with_interleaved_rotary_pairs_are_refused(checkpoint):
    spec = read_spec(checkpoint)
    spec = msgspec.structs.replace(spec, rope=msgspec.structs.replace(spec.rope, interleaved=True))
    with pytest.raises(ValueError, match="interleaved"):
        registry.build(spec, dtype=torch.float32, device=torch.device("cpu"))


def test_missing_tensor(checkpoint):
    rewrite(checkpoint, lambda t: t.pop("model.layers.1.self_attn.k_proj.weight"))
    refused(checkpoint, "model.layers.1.self_attn.k_proj.weight", "missing", str(checkpoint))


def test_a_head_that_only_the_embedding_could_be(checkpoint):
    rewrite(checkpoint, lambda t: t.pop("lm_head.weight"))
    refused(checkpoint, "lm_head.weight", "missing", "set tie_word_embeddings to true")


def test_a_folder_of_pickled_files_alone(checkpoint):
    (checkpoint / FILE).rename(checkpoint / "pytorch_model.bin")
    refused(checkpoint, "no .safetensors file, but pytorch_model.bin", "never read", "save_pretrained")


def test_unexpected_tensor(checkpoint):
    rewrite(checkpoint, lambda t: t.update({"model.layers.0.self_attn.q_norm.weight": torch.ones(16)}))
    refused(checkpoint, "model.layers.0.self_attn.q_norm.weight", "unexpected", FILE)


def test_layers_past_the_last_are_unexpected_in_a_family_without_mtp(checkpoint):
    rewrite(checkpoint, lambda t: t.update({"model.layers.3.input_layernorm.weight": torch.ones(64)}))
    refused(checkpoint, "model.layers.3.input_layernorm.weight", "unexpected")


def test_wrong_shape(checkpoint):
    rewrite(checkpoint, lambda t: t.update({"model.layers.2.mlp.up_proj.weight": torch.ones(64, 96)}))
    refused(checkpoint, "model.layers.2.mlp.up_proj.weight", "[64, 96]", "[96, 64]", FILE)


def test_wrong_type(checkpoint):
    rewrite(checkpoint, lambda t: t.update({"model.norm.weight": torch.ones(64, dtype=torch.int32)}))
    refused(checkpoint, "model.norm.weight", "I32", FILE)


def test_fp8_tensor_without_quantization_config(checkpoint):
    rewrite(checkpoint, lambda t: t.update({"lm_head.weight": t["lm_head.weight"].to(torch.float8_e4m3fn)}))
    refused(checkpoint, "lm_head.weight", "F8_E4M3", "quantization_config")


@pytest.mark.parametrize("keep", [3, 500, -1])
def test_truncated_file(checkpoint, keep):
    file = checkpoint / FILE
    file.write_bytes(file.read_bytes()[:keep])
    refused(checkpoint, str(file))


def test_no_safetensors(checkpoint):
    (checkpoint / FILE).rename(checkpoint / "pytorch_model.bin")
    refused(checkpoint, "no .safetensors file")


@pytest.fixture
def shards(checkpoint):
    """Write a checkpoint of two shards with an index. Returns its folder."""
    tensors = load_file(checkpoint / FILE)
    (checkpoint / FILE).unlink()
    names = sorted(tensors)
    index = {n: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, n in enumerate(names)}
    for shard in set(index.values()):
        save_file({n: tensors[n] for n in names if index[n] == shard}, checkpoint / shard)
    (checkpoint / files.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return checkpoint


def edit_index(folder, change):
    data = json.loads((folder / files.INDEX).read_text())
    change(data["weight_map"])
    (folder / files.INDEX).write_text(json.dumps(data))


def test_shards_load_as_one_file_does(shards, tmp_path_factory):
    whole = tmp_path_factory.mktemp("whole")
    make("llama", whole)
    for (name, a), (_, b) in zip(load(shards).named_parameters(), load(whole).named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_missing_shard_file(shards):
    (shards / "model-00002-of-00002.safetensors").unlink()
    refused(shards, "model-00002-of-00002.safetensors", "no such file")


def test_what_the_index_says_beyond_its_files_does_not_matter(shards):
    """transformers opens the files, too: published indexes list old buffers that no file has."""
    index = {
        "lm_head.weight": "model-00002-of-00002.safetensors",
        "model.rotary_emb.inv_freq": "model-00001-of-00002.safetensors",
    }
    edit_index(shards, lambda m: m.update(index))
    load(shards)


@pytest.mark.parametrize("shard", ["model-00001-of-00002.safetensors", "gone.safetensors"])
def test_a_whole_file_is_read_and_not_the_index_beside_it(checkpoint, shard, caplog):
    wanted = load_file(checkpoint / FILE)
    save_file({name: 2 * tensor for name, tensor in wanted.items()}, checkpoint / "model-00001-of-00002.safetensors")
    (checkpoint / files.INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(wanted, shard)}))
    parameters = dict(load(checkpoint).named_parameters())
    assert torch.equal(parameters["embedding"], wanted["model.embed_tokens.weight"])
    assert "model.safetensors.index.json: it is not read" in caplog.text


def test_an_index_may_list_the_whole_file(checkpoint, caplog):
    names = load_file(checkpoint / FILE)
    (checkpoint / files.INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, FILE)}))
    load(checkpoint)
    assert not caplog.text


def test_shard_missing_from_the_index(shards):
    edit_index(shards, lambda m: [m.pop(n) for n in [n for n in m if m[n].startswith("model-00002")]])
    refused(shards, "missing")


def test_index_leads_out_of_the_folder(shards):
    edit_index(shards, lambda m: m.update({"lm_head.weight": "../secret.safetensors"}))
    refused(shards, "lm_head.weight", "../secret.safetensors")


def test_bfloat16_checkpoint_is_converted_to_the_models_type(checkpoint):
    rewrite(checkpoint, lambda t: t.update({n: x.bfloat16() for n, x in t.items()}))
    parameters = dict(load(checkpoint).named_parameters())
    wanted = load_file(checkpoint / FILE)["model.embed_tokens.weight"].float()
    assert torch.equal(parameters["embedding"], wanted)


def test_mtp_layers_are_left_out(tmp_path):
    reference = make("deepseek-v3", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"num_nextn_predict_layers": 1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    rewrite(tmp_path, lambda t: t.update({"model.layers.3.enorm.weight": torch.ones(64)}))
    (tokens,) = random_sequences(VOCAB, (11,))
    (logits,) = PagedRun(load(tmp_path), [tokens]).run(num_decoded=1)
    torch.testing.assert_close(logits, reference_logits(reference, tokens), atol=1e-4, rtol=0.0)
    rewrite(tmp_path, lambda t: t.update({"model.layers.4.enorm.weight": torch.ones(64)}))
    refused(tmp_path, "model.layers.4.enorm.weight", "unexpected")


@pytest.mark.parametrize("name", ["llama-tied", "qwen2", "qwen3-moe", "deepseek-v3", "glm4-moe", "glm4-moe-lite", "minimax-m2"])
def test_every_parameter_is_a_target(name, tmp_path):
    """The load targets of a model must cover each number of the model's parameters exactly once."""
    make(name, tmp_path)
    model = build(tmp_path)
    for parameter in model.parameters():
        parameter.zero_()
    for target in model.weights().targets.values():
        target.add_(1.0)
    assert all(bool((p == 1.0).all()) for p in model.parameters())


def test_dummy_weights_are_seeded_and_of_the_right_kind(tmp_path):
    make("deepseek-v3", tmp_path)
    a, b, c = build(tmp_path), build(tmp_path), build(tmp_path)
    for model, seed in ((a, 1), (b, 1), (c, 2)):
        dummy.fill(model, seed=seed)
    for (name, x), y in zip(a.named_parameters(), b.parameters(), strict=True):
        assert torch.equal(x, y)
        if re.search("norm", name):
            assert bool((x == 1).all())
        elif name.endswith("bias"):
            assert bool((x == 0).all())
        else:
            assert 0.015 < float(x.std()) < 0.025
    assert not torch.equal(a.embedding, c.embedding)
