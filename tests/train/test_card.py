"""Tests that the model cards state exactly the recorded figures."""

from __future__ import annotations

import json

import pytest

from train import card

LOG = [
    {"step": 50 * i, "tokens": 5000 * i, "length": 16 if i < 3 else 32, "loss": 3.0 / i, "second_loss": 3.2 / i, "tok_s": 1e6 * i}
    for i in range(1, 5)
]
RUN = {"device": "A GPU", "devices": 2, "parameters": 12_340_000, "seconds": 90, "plan": {"steps": 200, "tokens_per_step": 100}}
EVALUATION = {
    "bits_per_byte": 0.6,
    "top1": 0.61,
    "mtp_acceptance": 0.72,
    "draft_acceptance": 0.53,
    "xz_bits_per_byte": 1.5,
    "xz_per_file_bits_per_byte": 1.9,
    "expert_max_over_mean_max": 1.34,
    "expert_utilisation": 0.875,
}


@pytest.fixture
def folders(tmp_path):
    work, checkpoints = tmp_path / "work", tmp_path / "checkpoints"
    manifest = {
        "nearest": 0.64,
        "dropped": {"over_budget": 1234, "size": 5},
        "heldout": {"files": 7, "bytes": 1200, "code_bytes": 300, "sha256_uncompressed": "feed"},
        "sources": {
            "a": {"licence": "MIT", "kept_bytes": 5_000_000},
            "b": {"licence": "PSF-2.0", "kept_bytes": 9_000_000},
            "c": {"licence": "ISC", "kept_bytes": 100_000},
        },
    }
    written = {
        work / "tokens.json": {"documents": 42, "tokens": 10_000},
        work / "corpus" / "manifest.json": manifest,
        checkpoints / "tidepool" / "config.json": {
            "n_routed_experts": 16,
            "n_group": 4,
            "num_experts_per_tok": 4,
            "max_position_embeddings": 4096,
            "vocab_size": 8192,
        },
    }
    for name in ("tidepool", "tidepool-draft"):
        (checkpoints / name).mkdir(parents=True)
        written[work / name / "run.json"] = RUN
    for path, content in written.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))
    for name in ("tidepool", "tidepool-draft"):
        (work / name / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LOG))
    lines = [EVALUATION | {"precision": "bfloat16"}, EVALUATION | {"precision": "fp8", "bits_per_byte": 9.9}]
    lines.append(EVALUATION | {"precision": "fp8", "bits_per_byte": 0.75})  # the second fp8 line: the card must show the last one
    (checkpoints / "tidepool" / "evaluation.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return work, checkpoints


def test_they_are_filled_from_the_records(folders):
    work, checkpoints = folders
    card.main(work, checkpoints)
    text = (checkpoints / "tidepool" / "README.md").read_text()
    for said in (
        "12.3 million parameters",
        "42 files",
        "9 MB PSF-2.0, 5 MB MIT, and 0.1 MB under other",
        "200 steps of 100 tokens",
        "2.0 epochs",
        "1.5 minutes on 2 A GPU",
        "| fp8 | 0.7500 | 61.0% | 72.0% |",
        "| bfloat16 | 0.6000 |",
        "2.0 times as many",
        "1.34 times",
        "87.5% of the experts",
        "1,200 bytes (25% code)",
        "`feed`",
        "1,234 that",
        "more than 64% of its lines",
        "1.50 million tokens/s, then",
    ):
        assert said in text
    assert (checkpoints / "tidepool" / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert (checkpoints / "tidepool" / "training.jsonl").read_text() == (work / "tidepool" / "log.jsonl").read_text()
    draft = (checkpoints / "tidepool-draft" / "README.md").read_text()
    assert "53.0% of Tidepool's greedy tokens" in draft


def test_what_was_not_recorded_is_named(folders):
    work, checkpoints = folders
    (checkpoints / "tidepool" / "evaluation.jsonl").unlink()
    with pytest.raises(SystemExit, match=r"evaluation\.jsonl: no such file"):
        card.main(work, checkpoints)
