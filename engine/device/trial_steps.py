"""Makes trial steps. They run once at start, to measure the memory of the largest steps.

A trial step uses one KV block for every position of every row, since only its memory matters and not its results.
"""

from __future__ import annotations

from engine.attention.long_prompts import LENGTH_STEP, MIN_PROMPT
from engine.device.graph_shapes import Key
from engine.plan import AdmittedRow, StepPlan
from engine.request import BOUNDS, SamplingParams

CONTEXT_TOKENS = 1 << 17  # tokens of all contexts of the trial step that `TrialLimits.long_contexts` makes
# Tokens of context before the longest chunk of a trial step. Attention reads a context in segments of up to 32,768 tokens
# (`attention/cached_context.py`), so a longer context takes no more memory.
CHUNK_CONTEXT = 1 << 16
SMALL_GRAPHS = 4  # number of small graphs that are captured to estimate the memory of each further graph
NUM_TOP = int(BOUNDS["logprobs"].high)
ALL_OPTIONS = SamplingParams(
    top_p=0.9,
    top_k=50,
    min_p=0.01,
    presence_penalty=0.1,
    frequency_penalty=0.1,
    repetition_penalty=1.1,
    logit_bias={0: 1.0},
    bad_words=((1,),),
    allowed_token_ids=(0,),
    min_tokens=1,
    logprobs=NUM_TOP,
)
PROMPT_LOGPROBS = SamplingParams(prompt_logprobs=NUM_TOP)


class TrialLimits:
    """Makes the steps that take the most memory, from the limits of a server: rows and tokens of a step, tokens of a request."""

    def __init__(self, *, max_rows: int, max_tokens: int, max_len: int, block_size: int) -> None:
        self.max_rows = max_rows
        self.max_tokens = max_tokens
        self.max_len = max_len
        self.block_size = block_size

    def steps(self) -> list[StepPlan]:
        """Make several steps without a graph. One of them takes the most memory of all steps without a graph."""
        steps = [self._all_rows(), self._one_prompt(), self._padded_prompts()]
        return steps if self.max_len <= self.max_tokens else [*steps, self._one_chunk()]

    def long_contexts(self) -> StepPlan | None:
        """Make a step of chunks of one or two tokens at the end of the longest contexts; None if one step holds a whole context.

        Latent attention expands the latents of such contexts to keys and values: several contexts together, up to
        `latent_chunks.EXPANDED_NUMBERS` numbers, and at least one whole context. Contexts of CONTEXT_TOKENS tokens in all reach
        this number if a latent expands to 1,024 numbers or more.
        """
        if self.max_len <= self.max_tokens:
            return None
        rows = max(1, min(self.max_rows, self.max_tokens // 2, CONTEXT_TOKENS // self.max_len))
        num = min(2, self.max_tokens)
        return self._plan(rows, start=self.max_len - num, num=num, params=SamplingParams())

    def _all_rows(self) -> StepPlan:
        """Make a step of all rows, each of which samples with every option."""
        num = max(1, min(self.max_tokens // self.max_rows, self.max_len - 1))
        return self._plan(self.max_rows, start=0, num=num, params=ALL_OPTIONS)

    def _one_prompt(self) -> StepPlan:
        """Make a step of one prompt that is as long as a step allows and that attention must pad."""
        longest = min(self.max_tokens, self.max_len)
        num = longest - 1 if longest > 1 and longest % LENGTH_STEP == 0 else longest
        return self._plan(1, start=0, num=num, params=PROMPT_LOGPROBS)

    def _one_chunk(self) -> StepPlan:
        """Make a step of one chunk that is as long as a step allows, behind a long context."""
        start = min(self.max_len - self.max_tokens, CHUNK_CONTEXT)
        return self._plan(1, start=start, num=self.max_tokens, params=PROMPT_LOGPROBS)

    def _padded_prompts(self) -> StepPlan:
        """Make a step of as many prompts as fit, of the length that attention pads most (by half of the length)."""
        num = min(MIN_PROMPT + 1, self.max_tokens, self.max_len)
        return self._plan(min(self.max_rows, self.max_tokens // num), start=0, num=num, params=PROMPT_LOGPROBS)

    def _plan(self, num_rows: int, *, start: int, num: int, params: SamplingParams) -> StepPlan:
        rows, length = list(range(num_rows)), start + num
        blocks = [0] * -(-length // self.block_size)
        admitted = [AdmittedRow(row, [0] * length, length, blocks, params, 0) for row in rows]
        return StepPlan(0, rows=rows, starts=[start] * num_rows, nums=[num] * num_rows, samples=rows, admitted=admitted)


def graph_keys(keys: list[Key]) -> list[Key]:
    """Select the graphs that a trial captures from the shapes `keys`, of which the first is the largest.

    They are the largest graph, the largest graph of decodes, and then some small graphs of decodes and of mixed steps.
    """
    decodes = sorted(key for key in keys if not key[1])
    mixed = sorted(key for key in keys if key[1])
    small = [*decodes[: SMALL_GRAPHS // 2], *mixed[: SMALL_GRAPHS // 2]]
    return list(dict.fromkeys([keys[0], decodes[-1], *small]))
