"""Tests that the bundled checkpoints are small, give the same logits in transformers and in the engine, and predict text well."""

from __future__ import annotations

import ast
import hashlib
import json
import lzma
from pathlib import Path

import pytest
import torch
from fp8_checkpoint import load_in_transformers
from paged import PagedRun
from transformers import AutoTokenizer

from engine import LLM, SamplingParams
from engine.models import registry
from engine.models.families import read_spec
from engine.weights import loader
from server.text.tokenizer import Tokenizer
from train.acceptance import TeacherForced, choose_prompts, continue_greedily, draft_acceptance
from train.scoring import EngineScorer, read_documents, score

ROOT = Path(__file__).parents[2]
TIDEPOOL, DRAFT = ROOT / "checkpoints" / "tidepool", ROOT / "checkpoints" / "tidepool-draft"
HELDOUT = ROOT / "train" / "heldout.jsonl.xz"
BOTH = pytest.mark.parametrize("folder", [TIDEPOOL, DRAFT], ids=lambda folder: folder.name)


@pytest.fixture(scope="module")
def texts():
    """Return the first six held-out files of under 3000 characters."""
    return [document.text for document in read_documents(HELDOUT) if len(document.text) < 3000][:6]


@pytest.fixture(scope="module")
def llm():
    with LLM(TIDEPOOL, device="cpu", cache={"num_blocks": 128, "prefix_caching": False}) as llm:
        yield llm


def test_bundled_checkpoints_are_small():
    size = {folder.name: sum(file.stat().st_size for file in folder.iterdir()) for folder in (TIDEPOOL, DRAFT)}
    assert size["tidepool"] <= 26_000_000
    assert size["tidepool-draft"] <= 4_000_000


@BOTH
def test_transformers_and_the_engine_compute_the_same_logits(folder, texts, tmp_path):
    tokens = Tokenizer.from_folder(str(folder)).encode(texts[0])[:400]
    engine = registry.build(read_spec(folder), dtype=torch.float32, device=torch.device("cpu"))
    loader.load(engine, folder)
    (found,) = PagedRun(engine, [tokens], block_size=64).run(num_decoded=4)
    reference, info = load_in_transformers(folder, tmp_path)
    assert not any(info[key] for key in ("missing_keys", "mismatched_keys", "error_msgs"))
    # Layer 9 is the MTP module, which transformers does not have.
    assert all(name.startswith("model.layers.9.") for name in info["unexpected_keys"])
    with torch.inference_mode():
        wanted = reference(torch.tensor([tokens])).logits[0]
    assert wanted.abs().max() > 10
    torch.testing.assert_close(found, wanted, atol=1e-3, rtol=0.0)


@BOTH
def test_transformers_and_the_server_tokenise_alike(folder, texts):
    theirs, ours = AutoTokenizer.from_pretrained(folder), Tokenizer.from_folder(str(folder))
    for text in texts:
        assert theirs.encode(text) == ours.encode(text)
        assert theirs.decode(ours.encode(text), skip_special_tokens=True) == text


def test_the_model_card_has_the_digest_of_the_held_out_text():
    digest = hashlib.sha256(lzma.decompress(HELDOUT.read_bytes())).hexdigest()
    assert digest in (TIDEPOOL / "README.md").read_text()


def test_tidepool_needs_less_than_half_the_bits_of_xz(llm, texts):
    """The test scores only a few held-out files, to be fast. The model card has the figures for all of them."""
    scorer = EngineScorer(llm)
    found = score(scorer, [scorer.encode(text) for text in texts], scorer.max_window)
    raw = "".join(texts).encode()
    assert found.bits_per_byte(len(raw)) < 8 * len(lzma.compress(raw, preset=9 | lzma.PRESET_EXTREME)) / len(raw) / 2
    assert found.top1 > 0.5


def test_tidepool_writes_python(llm):
    """At least four of eight sampled continuations of an import and a `def` must be valid Python."""
    params = [SamplingParams(max_tokens=96, temperature=0.4, seed=seed) for seed in range(8)]
    sampled = [answer.text.split("\n\n\n")[0] for answer in llm.generate(["import os\n\ndef "] * 8, params)]
    assert len(set(sampled)) > 4
    assert sum(parses(f"import os\n\ndef {text}") for text in sampled) >= 4


def parses(text):
    try:
        ast.parse(text)
    except SyntaxError:
        return False
    return True


def test_mtp_and_draft_model_predict_many_tokens(llm, texts):
    files = [llm.tokenizer.encode(text).ids for text in texts]
    continued = continue_greedily(llm, choose_prompts(files, 4))
    own = TeacherForced(TIDEPOOL, dtype=torch.float32, device=torch.device("cpu"))
    assert own.mtp_acceptance(continued) > 0.5
    with LLM(DRAFT, device="cpu", cache={"num_blocks": 64, "prefix_caching": False}) as draft:
        assert draft_acceptance(draft, continued) > 0.4


def test_every_layer_uses_its_experts(texts, llm):
    own = TeacherForced(TIDEPOOL, dtype=torch.float32, device=torch.device("cpu"))
    balance = own.expert_balance([llm.tokenizer.encode(text).ids for text in texts[:3]])
    config = json.loads((TIDEPOOL / "config.json").read_text())
    assert balance.layers == list(range(1, config["num_hidden_layers"] + 1))
    assert max(balance.max_over_mean) < 3.0  # measured over a few files; the model card has the figure for all
    assert balance.utilisation > 0.8
