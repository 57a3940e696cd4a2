"""The sampler's plain twin, for tests. It samples one row at a time, on the host, in float64, and is simple enough to check by
eye.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from engine.plan import NO_CHOICE, NO_TOKEN
from engine.request import SamplingParams, TokenLogprobs

Logits = npt.NDArray[np.float64]
_MASK = 2**64 - 1


def sample(
    logits: Logits, tokens: Sequence[int], num_prompt: int, params: SamplingParams, seed: int, eos_token_ids: Sequence[int] = ()
) -> tuple[int, TokenLogprobs | None]:
    """Sample the token after `tokens` from logits [V]. Returns (token, log-probabilities).

    The log-probabilities are None unless `params` requests them. Logits with NaN or +inf, or of -inf alone, give (NO_TOKEN,
    None). Restrictions that leave no token give (NO_CHOICE, None).
    """
    adjusted = adjust(logits.astype(np.float64), tokens, num_prompt, params, eos_token_ids)
    if math.isfinite(logits.max()) and adjusted.max() == -math.inf:
        return NO_CHOICE, None
    if not (math.isfinite(logits.max()) and math.isfinite(adjusted.max())):
        return NO_TOKEN, None
    u = uniform(seed, len(tokens))
    token = int(adjusted.argmax()) if params.greedy else inverse_cdf(probabilities(adjusted, params), u)
    return token, None if params.logprobs is None else logprobs(logits, token, params.logprobs)


def adjust(
    logits: Logits, tokens: Sequence[int], num_prompt: int, params: SamplingParams, eos_token_ids: Sequence[int]
) -> Logits:
    """Apply penalties, logit_bias and the restrictions of `params` to a copy of `logits`."""
    out = logits.copy()
    outputs = list(tokens[num_prompt:])
    for token in set(tokens):
        penalty = params.repetition_penalty
        out[token] = out[token] / penalty if out[token] > 0 else out[token] * penalty
    for token in set(outputs):
        out[token] -= params.frequency_penalty * outputs.count(token) + params.presence_penalty
    for token, bias in (params.logit_bias or {}).items():
        out[token] += bias
    if params.allowed_token_ids is not None:
        for token in set(range(len(out))) - set(params.allowed_token_ids):
            out[token] = -math.inf
    for *before, last in params.bad_words:
        if len(before) <= len(outputs) and outputs[len(outputs) - len(before) :] == before:
            out[last] = -math.inf
    if len(outputs) < params.min_tokens:
        for token in {*params.stop_token_ids, *params.end_ids(tuple(eos_token_ids))}:
            out[token] = -math.inf
    return out


def probabilities(logits: Logits, params: SamplingParams) -> Logits:
    """Compute the distribution to sample from, in vocabulary order. Tokens that a filter removes have probability 0."""
    with np.errstate(over="ignore"):  # near temperature 0 all logits but the largest become -inf
        scaled = (logits - logits.max()) / params.temperature
    ranked = sorted(scaled.tolist(), reverse=True)
    if params.top_k > 0:
        ranked = ranked[: params.top_k]
    total, mass = sum(map(math.exp, ranked)), 0.0
    kept: list[float] = []
    for value in ranked:
        if kept and params.top_p < 1.0 and mass >= params.top_p * total:
            break
        kept.append(value)
        mass += math.exp(value)
    least = max(kept[-1], math.log(params.min_p) if params.min_p else -math.inf)
    weights = np.where(scaled >= least, np.exp(scaled), 0.0)
    return np.asarray(weights / weights.sum())


def inverse_cdf(probs: Logits, u: float) -> int:
    """Find the first token at which the running sum of `probs` exceeds `u`."""
    running = 0.0
    for token, p in enumerate(probs.tolist()):
        running += p
        if running > u:
            return token
    return int(np.flatnonzero(probs)[-1])


def uniform(seed: int, position: int) -> float:
    """Compute the random number of `sampling/uniform.py` for a seed and a position, with Python's integers."""
    return (_splitmix((_splitmix(seed) + position * 0x9E3779B97F4A7C15) & _MASK) >> 11) * 2.0**-53


def _splitmix(x: int) -> int:
    z = (x + 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def logprobs(logits: Logits, token: int, num_top: int) -> TokenLogprobs:
    """Compute the log-softmax of the unadjusted logits, for `token` and for the `num_top` most probable tokens."""
    values = logits.astype(np.float64)
    values = values - values.max()
    values = values - math.log(np.exp(values).sum())
    top = np.argsort(-values, kind="stable")[:num_top]
    rank = 1 + int((values > values[token]).sum())
    return TokenLogprobs(token, float(values[token]), rank, top.tolist(), values[top].tolist())
