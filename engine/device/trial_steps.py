"""Steps that are run once at start, to measure the memory that the largest steps take.

All trial steps use one block for every position of every row: only the memory that a step takes matters, not its results.
"""

from __future__ import annotations

from engine.attention.long_prompts import LENGTH_STEP, MIN_PROMPT
from engine.device.graph_shapes import Key
from engine.plan import AdmittedRow, StepPlan
from engine.request import BOUNDS, SamplingParams

CONTEXT_TOKENS = 1 << 17  # see `long_contexts`
SMALL_GRAPHS = 4  # captured to find the memory of one more graph
NUM_TOP = int(BOUNDS["logprobs"].high)
ALL_OPTIONS = SamplingParams(
    top_p=0.9,
    top_k=50,
    min_p=0.01,
    presence_penalty=0.1,
    frequency_penalty=0.1,
    repetition_penalty=1.1,
    logit_bias={0: 1.0},
    min_tokens=1,
    logprobs=NUM_TOP,
)
PROMPT_LOGPROBS = SamplingParams(prompt_logprobs=NUM_TOP)


class TrialLimits:
    """The limits that decide which step takes most memory: rows and tokens of a step, and tokens of a request."""

    def __init__(self, *, max_rows: int, max_tokens: int, max_len: int, block_size: int) -> None:
        self.max_rows = max_rows
        self.max_tokens = max_tokens
        self.max_len = max_len
        self.block_size = block_size

    def steps(self) -> list[StepPlan]:
        """The kinds of steps without a graph of which one takes most memory."""
        return [self._all_rows(), self._one_prompt(), self._padded_prompts()]

    def long_contexts(self) -> StepPlan | None:
        """Chunks of one or two tokens at the end of the longest contexts; None if a prompt of one step is as long.

        Attention over latents expands the latents of such chunks to keys and values, of as many chunks together as
        `latent_chunks.EXPANDED_NUMBERS` allow, and always of one whole context. CONTEXT_TOKENS reach that limit if a latent
        expands to 1,024 numbers or more.
        """
        if self.max_len <= self.max_tokens:
            return None
        rows = max(1, min(self.max_rows, self.max_tokens // 2, CONTEXT_TOKENS // self.max_len))
        num = min(2, self.max_tokens)
        return self._plan(rows, start=self.max_len - num, num=num, params=SamplingParams())

    def _all_rows(self) -> StepPlan:
        """As many rows as there are, each sampling with every option."""
        num = max(1, min(self.max_tokens // self.max_rows, self.max_len - 1))
        return self._plan(self.max_rows, start=0, num=num, params=ALL_OPTIONS)

    def _one_prompt(self) -> StepPlan:
        """One prompt that is as long as a step allows, and is padded in attention."""
        longest = min(self.max_tokens, self.max_len)
        num = longest - 1 if longest > 1 and longest % LENGTH_STEP == 0 else longest
        return self._plan(1, start=0, num=num, params=PROMPT_LOGPROBS)

    def _padded_prompts(self) -> StepPlan:
        """Prompts of the length that attention pads most, by half of it, as many as a step holds."""
        num = min(MIN_PROMPT + 1, self.max_tokens, self.max_len)
        return self._plan(min(self.max_rows, self.max_tokens // num), start=0, num=num, params=PROMPT_LOGPROBS)

    def _plan(self, num_rows: int, *, start: int, num: int, params: SamplingParams) -> StepPlan:
        rows, length = list(range(num_rows)), start + num
        blocks = [0] * -(-length // self.block_size)
        admitted = [AdmittedRow(row, [0] * length, length, blocks, params, 0) for row in rows]
        return StepPlan(0, rows=rows, starts=[start] * num_rows, nums=[num] * num_rows, samples=rows, admitted=admitted)


def graph_keys(keys: list[Key]) -> list[Key]:
    """The graphs to capture in a trial, from all shapes with the largest one first: the largest mixed step and the largest step
    of decodes, then some small ones of both kinds."""
    decodes = sorted(key for key in keys if not key[1])
    mixed = sorted(key for key in keys if key[1])
    small = [*decodes[: SMALL_GRAPHS // 2], *mixed[: SMALL_GRAPHS // 2]]
    return list(dict.fromkeys([keys[0], decodes[-1], *small]))
