"""Measures how often a predicted token equals the model's next greedy token, and how evenly the model uses its experts.

An engine makes the greedy continuations. Predictions are then measured with teacher forcing: prompt and continuation go
through the model once as a whole, and each prediction is compared with the token that the model chose at that position.

    position           i           i + 1         i + 2
    token              prompt...   continuation
    MTP    sees        hidden[i]   token[i + 1]  predicts this one
    draft  sees        ...         token[i + 1]  predicts this one
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from engine import LLM, SamplingParams
from engine.attention import select
from engine.batch import ForwardBatch, LayerPools, PoolSpec
from engine.layers.linear import Norm, linear
from engine.layers.moe import MoeMlp, route
from engine.layers.ops import Ops
from engine.models import registry
from engine.models.deepseek_mtp import DeepseekMtp
from engine.models.families import read_spec
from engine.weights import loader

BLOCK_SIZE = 64
PROMPT_TOKENS = (128, 256)  # minimum and maximum length of a prompt
OUTPUT_TOKENS = 64
SEED = 2026


class Continued(NamedTuple):
    """Holds the token ids of a prompt and of its continuation by the model, in one list. The first `num_prompt` are the
    prompt."""

    ids: list[int]
    num_prompt: int


class Balance(NamedTuple):
    """Says how evenly tokens are spread over the experts. The lists have one entry for each layer with experts.

    `utilisation` is the share of experts, over all layers, that get at least half the mean load.
    """

    layers: list[int]
    max_over_mean: list[float]
    utilisation: float


def choose_prompts(files: Sequence[list[int]], num: int, *, seed: int = SEED) -> list[list[int]]:
    """Cut `num` prompts from the tokens of `files`, spread evenly over the files. The same seed gives the same prompts."""
    rng = random.Random(seed)
    usable = [ids for ids in files if len(ids) > 1]
    prompts = []
    for i in range(num if usable else 0):
        ids = usable[i * len(usable) // num]
        length = min(rng.randint(*PROMPT_TOKENS), len(ids) - 1)
        start = rng.randrange(len(ids) - length)
        prompts.append(ids[start : start + length])
    return prompts


def continue_greedily(llm: LLM, prompts: Sequence[list[int]], num_tokens: int = OUTPUT_TOKENS) -> list[Continued]:
    """Generate `num_tokens` tokens greedily after each prompt.

    A continuation has at most half as many tokens as the context can hold. A prompt is cut at its end if the context cannot hold
    it and the continuation.
    """
    most = llm.info.limits.max_model_len
    num_tokens = min(num_tokens, most // 2)
    room = most - num_tokens
    prompts = [prompt[:room] for prompt in prompts]
    completions = llm.generate(prompts, SamplingParams(max_tokens=num_tokens, temperature=0.0))
    return [Continued(p + c.token_ids, len(p)) for p, c in zip(prompts, completions, strict=True)]


def draft_acceptance(draft: LLM, continued: Sequence[Continued]) -> float | None:
    """Return the share of the continuations' tokens that are the draft model's argmax; None if there is no token."""
    params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)
    right = total = 0
    for c, said in zip(continued, draft.generate([c.ids for c in continued], params), strict=True):
        mine = (said.prompt_logprobs or [])[c.num_prompt :]
        right += sum(p is not None and p.rank == 1 for p in mine)
        total += len(mine)
    return right / total if total else None


class TeacherForced:
    """Runs a model, and its MTP module if the checkpoint has one, over whole given sequences, one sequence at a time."""

    def __init__(self, folder: Path, *, dtype: torch.dtype, device: torch.device) -> None:
        spec = read_spec(folder)
        self._device = device
        self._model = registry.build(spec, dtype=dtype, device=device)
        self._model.attention = select.choose(device, self._model.kv_pools()[0], BLOCK_SIZE)
        loader.load(self._model, folder)
        self.mtp: DeepseekMtp | None = loader.load_mtp(self._model, folder) if loader.has_mtp(spec, folder) else None

    @torch.inference_mode()
    def mtp_acceptance(self, continued: Sequence[Continued]) -> float | None:
        """Return the share of the continuations' tokens that the MTP module predicts. The first token of each continuation is not
        counted.

        The result is None if there is no MTP module or no token to count.
        """
        if self.mtp is None:
            return None
        right = total = 0
        for c in continued:
            ids = torch.tensor(c.ids, device=self._device)
            # The MTP module's outputs at positions 0 .. n - 3 predict the tokens 2 .. n - 1.
            out = self._run_mtp(self.mtp, self._run(ids), ids)[c.num_prompt - 1 : -1]
            wanted = ids[c.num_prompt + 1 :]
            right += int((self.mtp.logits(out).argmax(-1) == wanted).sum())
            total += len(wanted)
        return right / total if total else None

    @torch.inference_mode()
    def expert_balance(self, sequences: Sequence[list[int]]) -> Balance | None:
        """Measure the load of the experts over all tokens of `sequences`. Returns None for a model without experts."""
        layers: list[nn.Module] = [*self._model.decoder_layers(), *([] if self.mtp is None else [self.mtp.layer])]
        loads = {i: _ExpertLoad(m) for i, layer in enumerate(layers) for m in layer.modules() if isinstance(m, MoeMlp)}
        if not loads:
            return None
        try:
            for sequence in sequences:
                ids = torch.tensor(sequence, device=self._device)
                hidden = self._run(ids)
                if self.mtp is not None:
                    self._run_mtp(self.mtp, hidden, ids)
        finally:
            for load in loads.values():
                load.remove()
        return _balance({i: load.counts for i, load in loads.items()})

    def _run(self, ids: torch.Tensor) -> torch.Tensor:
        """Run the model on ids [T] -> hidden [T, H]."""
        return self._model(_whole(ids, self._model.kv_pools()))  # type: ignore[no-any-return]

    def _run_mtp(self, mtp: DeepseekMtp, hidden: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Run the MTP module on T tokens -> out [T - 1, H]. The last position has no next token as input."""
        return mtp(hidden[:-1], ids[1:], _whole(ids[:-1], mtp.kv_pools()))  # type: ignore[no-any-return]


class _ExpertLoad:
    """Counts the tokens that each expert of one layer gets.

    A hook evaluates the router a second time before the layer's forward, so that the engine needs no code that counts.
    """

    def __init__(self, moe: MoeMlp) -> None:
        self.counts = torch.zeros(moe.routing.num_experts, dtype=torch.int64)
        self._hook = moe.register_forward_pre_hook(self._count)

    def _count(self, module: nn.Module, inputs: tuple[torch.Tensor, Norm, Ops]) -> None:
        assert isinstance(module, MoeMlp)
        hidden, norm, ops = inputs
        x = ops.norm(hidden, *norm)
        _, ids = route(linear(x.to(module.router.dtype), module.router), module.routing, module.choice_bias)
        self.counts += ids.flatten().bincount(minlength=len(self.counts)).cpu()

    def remove(self) -> None:
        self._hook.remove()


def _balance(counts: dict[int, torch.Tensor]) -> Balance:
    share = torch.stack([c / c.float().mean() for c in counts.values()])  # [layers, experts]: load / mean load of the layer
    return Balance(
        layers=list(counts),
        max_over_mean=[round(float(s.max()), 4) for s in share],
        utilisation=float((share >= 0.5).float().mean()),
    )


def _whole(ids: torch.Tensor, pools: list[list[PoolSpec]]) -> ForwardBatch:
    """Make a batch that computes the whole sequence `ids` in one prefill step, with KV pools of its own."""
    num, device = len(ids), ids.device
    blocks = -(-num // BLOCK_SIZE)
    kv: list[LayerPools] = [
        {p.name: torch.zeros(blocks, BLOCK_SIZE, *p.shape, dtype=p.dtype, device=device) for p in layer} for layer in pools
    ]
    positions = torch.arange(num, device=device)
    return ForwardBatch(
        token_ids=ids,
        positions=positions,
        slots=positions,
        query_starts=torch.tensor([0, num], dtype=torch.int32, device=device),
        kv_lens=torch.tensor([num], dtype=torch.int32, device=device),
        block_tables=torch.arange(blocks, dtype=torch.int32, device=device).unsqueeze(0),
        num_decodes=0,
        query_lens_host=[num],
        kv_lens_host=[num],
        kv=kv,
    )
