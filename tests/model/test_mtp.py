"""Compares multi-token prediction (MTP) over a paged KV cache with a dense pass over the same tensors, in float32."""

from __future__ import annotations

import json

import pytest
import torch
from fp8_checkpoint import dequantize, quantize, to_fp8
from paged import PagedRun, random_sequences
from reference import VOCAB, make
from safetensors.torch import load_file, save_file

from engine.errors import CheckpointError
from engine.models import registry
from engine.models.families import read_spec
from engine.weights import loader

FILE = "model.safetensors"
LAYERS = 3  # layers of the main model; the reference has one more, which is the MTP module's layer
PREFIX = f"model.layers.{LAYERS}."
HIDDEN = 64


def make_with_mtp(name, folder, *, fp8=False, **changes):
    """Write a checkpoint with an MTP module to `folder`.

    Returns the transformers model and a dict of tensors. The transformers model has the MTP module's decoder layer as its last
    layer. The dict has the other tensors of the MTP module.
    """
    reference = make(name, folder, num_hidden_layers=LAYERS + 1, **changes)
    if fp8:
        to_fp8(folder, reference)
    config = json.loads((folder / "config.json").read_text())
    config |= {"num_hidden_layers": LAYERS, "num_nextn_predict_layers": 1}
    (folder / "config.json").write_text(json.dumps(config))
    size = reference.config.hidden_size
    extra = {f"{n}.weight": torch.empty(size).uniform_(0.5, 1.5) for n in ("enorm", "hnorm", "shared_head.norm")}
    extra["eh_proj.weight"] = torch.randn(size, 2 * size) * 0.1
    stored = {PREFIX + key: tensor for key, tensor in extra.items()}
    if fp8:
        name = PREFIX + "eh_proj.weight"
        stored[name], stored[name + "_scale_inv"] = quantize(extra["eh_proj.weight"])
        extra["eh_proj.weight"] = dequantize(stored[name], stored[name + "_scale_inv"])
    edit(folder, lambda tensors: tensors.update(stored))
    return reference, extra


def edit(folder, change):
    tensors = load_file(folder / FILE)
    change(tensors)
    save_file(tensors, folder / FILE, metadata={"format": "pt"})


def load(folder):
    model = registry.build(read_spec(folder), dtype=torch.float32, device=torch.device("cpu"))
    loader.load(model, folder)
    return model


def norm(x, weight):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight


@torch.inference_mode()
def dense_logits(reference, extra, tokens):
    """Compute the MTP module's logits [length - 1, V] in a dense pass. The logits at position i depend on the tokens 0 to i +
    1."""
    ids, decoder = torch.tensor([tokens]), reference.model
    mtp_layer = decoder.layers[LAYERS]
    hidden = decoder.embed_tokens(ids)
    num = len(tokens)
    places = decoder.rotary_emb(hidden, torch.arange(num)[None])
    mask = torch.full((num, num), float("-inf")).triu(1)[None, None]
    for layer in decoder.layers[:LAYERS]:
        hidden = layer(hidden, attention_mask=mask, position_embeddings=places)
    hidden = decoder.norm(hidden)
    parts = norm(decoder.embed_tokens(ids[:, 1:]), extra["enorm.weight"]), norm(hidden[:, :-1], extra["hnorm.weight"])
    joined = torch.cat(parts, -1) @ extra["eh_proj.weight"].T
    places = tuple(part[:, :-1] for part in places)
    out = mtp_layer(joined, attention_mask=mask[..., :-1, :-1], position_embeddings=places)
    return reference.lm_head(norm(out, extra["shared_head.norm.weight"]))[0]


class MtpRun(PagedRun):
    """Runs the main model and the MTP module over the same slices. Each of the two has its own KV pools and blocks."""

    def __init__(self, model, mtp, sequences):
        super().__init__(mtp, [s[:-1] for s in sequences], seed=1)
        self.main = PagedRun(model, [s[:-1] for s in sequences], seed=2)
        self.whole = sequences

    def step(self, slices, *, decodes=True):
        slices = sorted(slices, key=lambda s: s[1] > 1)
        num_decodes = sum(n == 1 for _, n in slices) if decodes else 0
        after = [self.whole[s][p + 1] for s, n in slices for p in range(self.computed[s], self.computed[s] + n)]
        batch, main_batch = self.batch(slices, num_decodes), self.main.batch(slices, num_decodes)
        with torch.inference_mode():
            hidden = self.main.model(main_batch)
            before = hidden.clone()
            rows = self.model.logits(self.model(hidden, torch.tensor(after), batch))
            assert torch.equal(hidden, before)  # the MTP module must leave its input unchanged
        for (s, n), part in zip(slices, rows.split(batch.query_lens_host), strict=True):
            self.logits[s] += part
            self.computed[s] += n
            self.main.computed[s] += n


def check_against_dense(folder, reference, extra):
    sequences = random_sequences(VOCAB, (3, 12, 33, 150))
    model = load(folder)
    found = MtpRun(model, loader.load_mtp(model, folder), sequences).run(num_decoded=2)
    for tokens, logits in zip(sequences, found, strict=True):
        wanted = dense_logits(reference, extra, tokens)
        assert wanted.abs().max() > 1.0  # with small logits the tolerance would be too loose
        torch.testing.assert_close(logits, wanted, atol=1e-4, rtol=0.0)


@pytest.mark.parametrize("name", ["deepseek-v3", "deepseek-v3-yarn", "deepseek-v3-no-q-lora", "deepseek-v3-halves"])
def test_chunks_and_decodes_equal_a_dense_pass(name, tmp_path):
    check_against_dense(tmp_path, *make_with_mtp(name, tmp_path))


def test_tied_embeddings_equal_a_dense_pass(tmp_path):
    check_against_dense(tmp_path, *make_with_mtp("deepseek-v3", tmp_path, tie_word_embeddings=True))


def test_an_fp8_checkpoint_equals_a_dense_pass(tmp_path):
    wide = {"hidden_size": 136, "intermediate_size": 200, "moe_intermediate_size": 144, "initializer_range": 0.05}
    check_against_dense(tmp_path, *make_with_mtp("deepseek-v3", tmp_path, fp8=True, **wide))


@pytest.fixture
def checkpoint(tmp_path):
    make_with_mtp("deepseek-v3", tmp_path)
    return tmp_path


def refused(folder, *words):
    model = load(folder)
    with pytest.raises(CheckpointError) as error:
        loader.load_mtp(model, folder)
    for word in words:
        assert word in error.value.message, error.value.message


@pytest.mark.parametrize("name", ["enorm.weight", "eh_proj.weight", "mlp.experts.5.up_proj.weight", "shared_head.norm.weight"])
def test_missing_tensor_is_named(checkpoint, name):
    edit(checkpoint, lambda t: t.pop(PREFIX + name))
    refused(checkpoint, str(checkpoint), PREFIX + name, "missing")


def test_unexpected_tensor_and_wrong_shape_are_named(checkpoint):
    edit(checkpoint, lambda t: t.update({PREFIX + "fnorm.weight": torch.ones(HIDDEN)}))
    refused(checkpoint, PREFIX + "fnorm.weight", "unexpected")
    edit(checkpoint, lambda t: (t.pop(PREFIX + "fnorm.weight"), t.update({PREFIX + "eh_proj.weight": torch.ones(HIDDEN, 5)})))
    refused(checkpoint, PREFIX + "eh_proj.weight", "[64, 5]", "[64, 128]")


def test_a_checkpoint_without_mtp_tensors_is_refused(checkpoint):
    assert loader.has_mtp(read_spec(checkpoint), checkpoint)
    edit(checkpoint, lambda t: [t.pop(n) for n in list(t) if n.startswith(PREFIX)])
    assert not loader.has_mtp(read_spec(checkpoint), checkpoint)
    refused(checkpoint, str(checkpoint), "num_nextn_predict_layers is 1", PREFIX)


def test_a_config_without_an_mtp_layer_is_refused(tmp_path):
    make("deepseek-v3", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"num_nextn_predict_layers": 0}
    (tmp_path / "config.json").write_text(json.dumps(config))
    refused(tmp_path, "DeepseekV3ForCausalLM", "num_nextn_predict_layers")


def test_a_family_without_mtp_is_refused(tmp_path):
    make("llama", tmp_path)
    refused(tmp_path, "LlamaForCausalLM", "DeepseekV3ForCausalLM")


def duplicates(tensors, **changes):
    """Add a second copy of the embedding and of the head under the MTP module's names, as DeepSeek's own checkpoints have."""
    again = {"embed_tokens": tensors["model.embed_tokens.weight"], "shared_head.head": tensors["lm_head.weight"]}
    tensors.update({f"{PREFIX}{n}.weight": t.clone() + changes.get(n, 0.0) for n, t in again.items()})


def test_duplicates_of_embedding_and_head_are_accepted(tmp_path):
    reference, extra = make_with_mtp("deepseek-v3", tmp_path)
    edit(tmp_path, duplicates)
    check_against_dense(tmp_path, reference, extra)


@pytest.mark.parametrize("name", ["embed_tokens", "shared_head.head"])
def test_duplicates_of_embedding_and_head_that_differ_are_refused(checkpoint, name):
    edit(checkpoint, lambda t: duplicates(t, **{name: 1e-3}))
    refused(checkpoint, f"{PREFIX}{name}.weight", "equal")


def test_bfloat16_duplicates_are_compared_with_weights_loaded_from_bfloat16(checkpoint):
    def change(tensors):
        duplicates(tensors)
        tensors.update({n: t.bfloat16() for n, t in tensors.items()})

    edit(checkpoint, change)
    loader.load_mtp(load(checkpoint), checkpoint)


def test_embedding_and_head_are_the_main_models_and_the_rest_are_targets(checkpoint):
    model = load(checkpoint)
    mtp = registry.build_mtp(model)
    assert not {id(p) for p in mtp.parameters()} & {id(p) for p in model.parameters()}
    for parameter in mtp.parameters():
        parameter.zero_()
    for target in mtp.weights().targets.values():
        target.add_(1.0)
    assert all(bool((p == 1.0).all()) for p in mtp.parameters())
    with torch.inference_mode():
        model.embedding.zero_()
        model.lm_head.weight.zero_()
        assert not mtp.logits(torch.randn(3, HIDDEN)).any()
