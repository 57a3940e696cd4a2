"""Compares the logits of every model family over a paged KV cache with those of transformers, in float32."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from paged import PagedRun, random_sequences
from reference import CASES, VOCAB, make, reference_logits

from engine.models import registry
from engine.models.families import read_spec
from engine.weights import loader

LENGTHS = (7, 12, 33, 150)


@pytest.fixture(scope="module")
def sequences() -> list[list[int]]:
    return random_sequences(VOCAB, LENGTHS)


def load(folder) -> registry.Model:
    model = registry.build(read_spec(folder), dtype=torch.float32, device=torch.device("cpu"))
    loader.load(model, folder)
    return model


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_transformers(name, tmp_path, sequences):
    reference = make(name, tmp_path)
    found = PagedRun(load(tmp_path), sequences).run(num_decoded=5)
    for tokens, logits in zip(sequences, found, strict=True):
        wanted = reference_logits(reference, tokens)
        assert wanted.abs().max() > 1.0  # with small logits the tolerance would be too loose
        torch.testing.assert_close(logits, wanted, atol=1e-4, rtol=0.0)


@pytest.mark.parametrize("name", ["llama", "deepseek-v2-yarn", "deepseek-v3", "ministral3", "minimax-m2"])
def test_decode_path_equals_chunk_path(name, tmp_path, sequences):
    """A slice of one token has equal logits whether it runs as a decode (batched; MLA in latent space) or as a prompt chunk (one
    sequence at a time; MLA expanded)."""
    make(name, tmp_path)
    model = load(tmp_path)
    as_decodes = PagedRun(model, sequences).run(num_decoded=6)
    as_chunks = PagedRun(model, sequences).run(num_decoded=6, decodes=False)
    for a, b in zip(as_decodes, as_chunks, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["qwen3-tied-yarn", "qwen3-moe", "deepseek-v3-yarn"])
def test_bfloat16_logits_correlate_with_those_of_float32(name, tmp_path, sequences):
    """The model runs entirely in bfloat16. The comparison with float32 is loose, since bfloat16 rounding changes logits."""
    reference = make(name, tmp_path, initializer_range=0.03)
    model = registry.build(read_spec(tmp_path), dtype=torch.bfloat16, device=torch.device("cpu"))
    loader.load(model, tmp_path)
    assert {pool.dtype for layer in model.kv_pools() for pool in layer} == {torch.bfloat16}
    for tokens, logits in zip(sequences, PagedRun(model, sequences).run(num_decoded=3), strict=True):
        wanted = reference_logits(reference, tokens)
        assert torch.corrcoef(torch.stack((logits.float().flatten(), wanted.flatten())))[0, 1] > 0.99


@pytest.mark.parametrize("name", ["llama", "qwen3-moe", "deepseek-v3"])
def test_a_sequence_does_not_depend_on_its_batch(name, tmp_path, sequences):
    make(name, tmp_path)
    model = load(tmp_path)
    together = PagedRun(model, sequences).run(num_decoded=6)
    for tokens, logits in zip(sequences, together, strict=True):
        (alone,) = PagedRun(model, [tokens], block_size=16).run(num_decoded=6, seed=1)
        torch.testing.assert_close(alone, logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("read", [[0, 2], [1], []], ids=["decode and chunk", "chunk", "none"])
@pytest.mark.parametrize("name", ["llama", "qwen3-moe", "deepseek-v2-yarn", "deepseek-v3", "ministral3", "minimax-m2"])
def test_the_last_layer_computes_only_the_tokens_that_are_read(name, read, tmp_path, sequences):
    """A batch whose field `read` names some tokens gives the same hidden states for these tokens, and the same KV for all tokens,
    as a batch without `read`."""
    make(name, tmp_path)
    model = load(tmp_path)
    whole, some = PagedRun(model, sequences), PagedRun(model, sequences)
    for run in (whole, some):
        run.step([(3, 100), (1, 5)])
    slices = [(1, 1), (2, 9), (3, 50)]
    last = (whole.batch(slices, 1).query_starts[1:] - 1)[read].long()
    with torch.inference_mode():
        expected = model(whole.batch(slices, 1)).index_select(0, last)
        batch = some.batch(slices, 1)
        lens = [batch.kv_lens_host[i] for i in read]
        found = model(replace(batch, read=batch.last_tokens(last, batch.kv_lens[read], batch.block_tables[read], lens)))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    for a, b in zip(whole.kv, some.kv, strict=True):
        for pool in a:
            torch.testing.assert_close(b[pool], a[pool], atol=1e-5, rtol=1e-5)
