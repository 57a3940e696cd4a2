"""Calculates the least time of a workload on given hardware: the sum of a roofline (Williams et al., 2009) over its steps.

A step reads each weight that it uses once, and the KV of each attended token once. It computes each product once:

    bound of a step = max(bytes / bandwidth, floating-point operations / rate)

The steps are those of an ideal scheduler. A token that is not sampled needs only its KV of the last layer. The bound leaves out
norms, biases, activations, writes of KV, and kernel launches. It assumes that tokens choose experts at random. If the tokens of a
model agree on experts, a step reads fewer weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from engine.models.spec import MlaSpec, ModelSpec

SIZES = {"float32": 4, "bfloat16": 2, "float16": 2}  # name of a number type -> bytes that one number takes


class Hardware(NamedTuple):
    bandwidth: float  # bytes per second, to and from the device's memory
    rate: float  # floating-point operations per second that a matrix product reaches


class Length(NamedTuple):
    """Holds two token counts of one request: the prompt's tokens, and the tokens that the request generates."""

    prompt: int
    outputs: int


class Step(NamedTuple):
    """Counts the work of one step. A pair is a computed token and one token that it attends to. Each token also attends to
    itself."""

    tokens: int
    samples: int
    decode_pairs: int  # attention pairs of decode tokens, which is also the number of tokens whose KV the decodes read
    chunk_pairs: int  # attention pairs of the tokens of prompt chunks
    chunk_kv: int  # tokens whose KV the prompt chunks read
    last_pairs: int  # the part of chunk_pairs in which the computed token is the last of its prompt, whose logits are sampled


def steps(lengths: Iterable[Length], *, max_tokens: int, max_rows: int) -> Iterator[Step]:
    """Yield the steps of an ideal scheduler. A step has one token of every decoding request, and as many prompt tokens as
    still fit into `max_tokens`. At most `max_rows` requests run at once."""
    waiting = list(lengths)[::-1]
    prompts: list[tuple[Length, int]] = []  # each admitted prompt, and how many of its tokens are computed
    decodes: list[tuple[int, int]] = []  # tokens that a request's next token attends to, and its tokens to generate
    while waiting or prompts or decodes:
        while waiting and len(prompts) + len(decodes) < max_rows:
            prompts.append((waiting.pop(), 0))
        budget = max_tokens - len(decodes)
        tokens = samples = len(decodes)
        decode_pairs = sum(context for context, _ in decodes)
        decodes = [(context + 1, left - 1) for context, left in decodes if left > 1]
        chunk_pairs = chunk_kv = last_pairs = 0
        unfinished = []
        for length, start in prompts:
            end = min(length.prompt, start + budget)
            budget -= end - start
            tokens += end - start
            chunk_pairs += (end * (end + 1) - start * (start + 1)) // 2
            chunk_kv += end if end > start else 0
            if end < length.prompt:
                unfinished.append((length, end))
                continue
            samples += 1
            last_pairs += end
            if length.outputs > 1:
                decodes.append((length.prompt + 1, length.outputs - 1))
        prompts = unfinished
        yield Step(tokens, samples, decode_pairs, chunk_pairs, chunk_kv, last_pairs)


@dataclass(frozen=True, slots=True)
class Costs:
    """Counts what a model reads (numbers: weights, cache entries) and computes (multiply-adds), over all layers together.

    The `spared` fields count what a step saves in the last layer for a token whose logits are not sampled.
    """

    weights: int  # weights that every token uses: attention, dense and shared MLPs, routers
    expert: int  # weights of one expert
    num_experts: int  # experts in one layer
    top_k: int  # experts that one token uses in one layer
    moe_layers: int  # layers that have experts
    head: int  # weights of the output head
    hidden: int  # numbers in one row of the embedding
    kv: int  # numbers in the KV cache for one token
    decode_pair: int  # multiply-adds for a pair in a decode
    chunk_pair: int  # multiply-adds for a pair in a prompt chunk
    spared: int  # weights of the last layer that are not used, without experts
    spared_experts: int  # 1 if the last layer has experts, else 0
    spared_pair: int  # multiply-adds for a pair in a prompt chunk, in one layer
    spared_kv: int  # cache entries of one token in one layer

    @staticmethod
    def of(spec: ModelSpec) -> Costs:
        """Calculate the bytes and operations that each token costs, for the model that `spec` describes."""
        hidden, moe, layers = spec.hidden_size, spec.moe, spec.num_layers
        attention, kv, decode_pair, chunk_pair = _attention(spec) if spec.mla is None else _latent(spec, spec.mla)
        moe_layers = len(moe.layers) if moe else 0
        dense = 3 * hidden * spec.intermediate_size
        routed = hidden * (moe.routing.num_experts + 3 * moe.shared_size) if moe else 0
        ends_in_experts = moe is not None and layers - 1 in moe.layers
        return Costs(
            weights=layers * attention + (layers - moe_layers) * dense + moe_layers * routed,
            expert=3 * hidden * moe.intermediate_size if moe else 0,
            num_experts=moe.routing.num_experts if moe else 1,
            top_k=moe.routing.top_k if moe else 0,
            moe_layers=moe_layers,
            head=hidden * spec.vocab_size,
            hidden=hidden,
            kv=layers * kv,
            decode_pair=layers * decode_pair,
            chunk_pair=layers * chunk_pair,
            spared=attention - hidden * kv + (routed if ends_in_experts else dense),
            spared_experts=int(ends_in_experts),
            spared_pair=chunk_pair,
            spared_kv=kv,
        )

    def numbers_read(self, step: Step) -> float:
        """Return how many weights and KV cache entries a step reads. The number of experts is an expected value."""
        layers = (self.moe_layers - self.spared_experts, step.tokens), (self.spared_experts, step.samples)
        experts = sum(num * self._distinct(tokens) for num, tokens in layers)
        weights = self.weights + experts * self.expert + (self.head if step.samples else -self.spared)
        kv = (step.decode_pairs + step.chunk_kv) * self.kv - (step.chunk_kv - step.last_pairs) * self.spared_kv
        return weights + step.tokens * self.hidden + kv

    def _distinct(self, tokens: int) -> float:
        """Return the expected number of different experts in one layer that `tokens` tokens choose at random."""
        return self.num_experts * (1 - (1 - self.top_k / self.num_experts) ** tokens)

    def operations(self, step: Step) -> float:
        """Return the number of floating-point operations of a step. Each multiply-add counts as two."""
        products = step.tokens * (self.weights + self.moe_layers * self.top_k * self.expert) + step.samples * self.head
        products -= (step.tokens - step.samples) * (self.spared + self.spared_experts * self.top_k * self.expert)
        pairs = step.decode_pairs * self.decode_pair + step.chunk_pairs * self.chunk_pair
        pairs -= (step.chunk_pairs - step.last_pairs) * self.spared_pair
        return 2.0 * (products + pairs)


def _attention(spec: ModelSpec) -> tuple[int, int, int, int]:
    """Count one layer of ordinary attention: (weights, cache entries of a token, multiply-adds for a pair in a decode,
    multiply-adds for a pair in a prompt chunk)."""
    heads = spec.num_heads * spec.head_dim
    kv = 2 * spec.num_kv_heads * spec.head_dim
    return spec.hidden_size * (2 * heads + kv), kv, 2 * heads, 2 * heads


def _latent(spec: ModelSpec, mla: MlaSpec) -> tuple[int, int, int, int]:
    """Count one layer of MLA: (weights, cache entries of a token, multiply-adds for a pair in a decode, multiply-adds for a
    pair in a prompt chunk). A decode attends in latent space. For a prompt chunk, each key and value is expanded once."""
    hidden, heads, rank = spec.hidden_size, spec.num_heads, mla.kv_lora_rank
    q_size = heads * (mla.nope_dim + mla.rope_dim)
    queries = hidden * q_size if mla.q_lora_rank is None else mla.q_lora_rank * (hidden + q_size)
    record = rank + mla.rope_dim
    weights = queries + hidden * record + rank * heads * (mla.nope_dim + mla.v_dim) + heads * mla.v_dim * hidden
    return weights, record, heads * (record + rank), heads * (mla.nope_dim + mla.rope_dim + mla.v_dim)


def step_seconds(costs: Costs, step: Step, hardware: Hardware, *, number_size: int) -> float:
    """Return the least time of one step, in seconds. `number_size` is the size of a weight and of a cache entry, in bytes."""
    return max(number_size * costs.numbers_read(step) / hardware.bandwidth, costs.operations(step) / hardware.rate)


def workload_seconds(
    spec: ModelSpec, lengths: Iterable[Length], hardware: Hardware, *, number_size: int, max_tokens: int, max_rows: int
) -> float:
    """Return the least time of a workload, in seconds, if a step has at most `max_tokens` tokens and `max_rows` requests.

    `number_size` is the size of a weight and of a cache entry, in bytes.
    """
    costs = Costs.of(spec)
    found = steps(lengths, max_tokens=max_tokens, max_rows=max_rows)
    return sum(step_seconds(costs, step, hardware, number_size=number_size) for step in found)
