"""Compares the logits of decodes in CUDA graphs with those of `transformers` for the same tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from engine import LLM, SamplingParams

CLOSE = 2e-2  # largest relative error of bfloat16 logits


class Lengths(NamedTuple):
    prompt: int
    outputs: int
    compared: int  # number of outputs whose logits are compared; these are the last ones


class Decodes(NamedTuple):
    tokens: list[int]  # token ids of the prompt and the outputs
    logits: torch.Tensor  # [compared, V] float32: the logits that the last outputs were sampled from


def decode(folder: Path, vocab_size: int, lengths: Lengths) -> Decodes:
    """Generate outputs for a random prompt with the checkpoint in `folder`, in bfloat16 on the GPU, and record the logits of the
    last decodes. Each of these decodes must run in a CUDA graph."""
    prompt = torch.randint(3, vocab_size, (lengths.prompt,), generator=torch.Generator().manual_seed(1)).tolist()
    logits: list[torch.Tensor] = []
    options: dict[str, Any] = {"max_model_len": 4096, "cache": {"num_blocks": 64}, "scheduler": {"max_num_seqs": 4}}
    with LLM(folder, device="cuda", dtype="bfloat16", **options) as llm:
        graphs = llm._core._runner.graphs
        run = graphs.run

        def recorded(slices, uniforms, begins):
            output = run(slices, uniforms, begins)
            if output is not None and slices.ends[0] > lengths.prompt + lengths.outputs - 1 - lengths.compared:
                logits.append(output.logits.clone())
            return output

        graphs.run = recorded
        params = SamplingParams(max_tokens=lengths.outputs, temperature=1.0, seed=5, ignore_eos=True)
        (completion,) = llm.generate([prompt], params)
    assert len(logits) >= lengths.compared, "some of the last decodes did not run in a graph"
    return Decodes(prompt + completion.token_ids, torch.cat(logits)[-lengths.compared :].float())


def check(decodes: Decodes, model: PreTrainedModel, *, experts: bool, most: float = 0.9) -> None:
    """Fail unless the logits are close to those of `model`: for the share `most` of the tokens one by one and, if the model has
    no experts, for all tokens together."""
    ours = decodes.logits
    with torch.inference_mode():
        wanted = model(torch.tensor([decodes.tokens[:-1]], device=ours.device)).logits[0, -ours.shape[0] :].float()
    assert ours.shape == wanted.shape
    errors = (ours - wanted).norm(dim=-1) / wanted.norm(dim=-1)
    if not experts:
        assert (ours - wanted).norm() / wanted.norm() < CLOSE, errors
    # If two experts, or two groups, score nearly the same, the two sides may choose differently, and a few tokens differ a lot.
    assert errors.quantile(most) < CLOSE, errors
