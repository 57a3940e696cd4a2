"""TorchRunner: executes plans on a device, one after the other in the order they come.

    plan -> block copies -> ForwardBatch -> backend.forward -> logits of the positions that sample -> sampler
                                ^                                                                        |
                                '--- each row's latest token, on the device <----------------------------'

On CUDA a step that is not large is one graph of all this (`graphs.py`), up to the sampler where a row has penalties, a bias
or stop tokens forbidden, or wants log-probabilities.

Nothing in `submit` waits for the device, so with overlap the next plan is on its way while this one runs; the order of the
device's stream is what makes that right. `result` waits for the copy of the tokens, and for nothing that came later.
"""

from __future__ import annotations

import numpy as np
import torch

from engine.backends.base import Backend
from engine.config import EngineConfig, ModelLimits
from engine.device.graphs import Decoded, StepGraphs
from engine.device.inputs import Ints, Rows, Slices, Uploader
from engine.device.pending import Pending, Reported, to_host
from engine.device.warmup import Rehearsals
from engine.errors import ConfigError
from engine.kvcache.storage import KVStorage
from engine.plan import PendingStep, StepPlan
from engine.sampling.logprobs import LogprobTensors, of_prompt
from engine.sampling.sampler import Sampler


class TorchRunner:
    """`config` is resolved."""

    def __init__(self, backend: Backend, storage: KVStorage, config: EngineConfig, limits: ModelLimits) -> None:
        device = torch.device(config.device)
        self._on_cuda = device.type == "cuda"
        self._last_done: torch.cuda.Event | None = None  # of the step submitted last
        max_rows = config.scheduler.max_num_seqs
        self._backend = backend
        self._storage = storage
        self._upload = Uploader(device)
        self._rows = Rows(
            max_rows=max_rows,
            max_len=config.max_model_len or limits.max_model_len,
            block_size=config.cache.block_size,
            scratch_block=storage.scratch_block,
            device=device,
            upload=self._upload,
        )
        self._sampler = Sampler(
            max_rows=max_rows,
            vocab_size=limits.vocab_size,
            eos_token_ids=limits.eos_token_ids,
            device=device,
            upload=self._upload,
        )
        self._graphs: StepGraphs | None = None
        if _use_graphs(backend, config):
            self._graphs = StepGraphs(
                backend, storage.layers, self._rows, self._sampler.on_device.choose, block_size=config.cache.block_size
            )
        self._rehearsals = Rehearsals(
            backend,
            storage.layers,
            scratch_block=storage.scratch_block,
            block_size=config.cache.block_size,
            most_tokens=min(config.scheduler.max_step_tokens or 1, config.max_model_len or limits.max_model_len),
            device=device,
        )
        self._vocab_size = limits.vocab_size

    @property
    def num_blocks(self) -> int:
        return self._storage.num_blocks

    @torch.inference_mode()
    def submit(self, plan: StepPlan) -> PendingStep:
        self._storage.copy(plan.copies, self._upload)
        self._sampler.admit(plan.admitted)
        self._rows.change(plan)
        slices = Slices.of(plan)
        pending = Pending(plan.step, on_cuda=self._on_cuda, after=self._last_done)
        wants_hidden, decoded = self._wants_hidden(slices), None
        if self._graphs is not None and not wants_hidden:
            decoded = self._graphs.run(slices, self._sampler.uniforms, pending.begins)
        if decoded is not None:
            self._take(decoded, slices, pending)
        else:
            self._run(plan, slices, pending, wants_hidden=wants_hidden)
        pending.submitted()
        self._last_done = pending.done
        return pending

    @torch.inference_mode()
    def prepare(self) -> bool:
        """Capture a graph that steps will want, or where all are there rehearse a long prompt; False: nothing is left to do."""
        return (self._graphs is not None and self._graphs.capture_next()) or self._rehearsals.next()

    def _take(self, decoded: Decoded, slices: Slices, pending: Pending) -> None:
        """What a graph gave: for all slices, of which some may not sample."""
        if not slices.samples.size:
            return
        rows, everyone = slices.rows[slices.samples], slices.samples.size == slices.rows.size
        if self._sampler.is_plain(rows, slices.ends[slices.samples]):
            pending.tokens = to_host(decoded.tokens)
            pending.sampling = None if everyone else slices.samples.tolist()
            return
        which, on_device = self._upload([slices.samples, rows])
        self._sample(decoded.logits if everyone else decoded.logits.index_select(0, which), slices, on_device, pending)

    def _run(self, plan: StepPlan, slices: Slices, pending: Pending, *, wants_hidden: bool) -> None:
        inputs = self._rows.batch(plan, slices, self._storage.layers, all_read=wants_hidden)
        pending.begins()
        hidden = self._backend.forward(inputs.batch)
        if wants_hidden:
            self._prompt_logprobs(hidden, slices, pending)
            hidden = hidden.index_select(0, inputs.last_index)
        if plan.samples:
            self._sample(self._backend.logits(hidden), slices, inputs.sampled_rows, pending)

    def _sample(self, logits: torch.Tensor, slices: Slices, sampled_rows: torch.Tensor, pending: Pending) -> None:
        """`logits` [S, V] and `sampled_rows` [S] are of the slices that sample."""
        sampled = self._sampler.sample(logits, slices.rows[slices.samples], slices.ends[slices.samples])
        self._rows.set_latest(sampled_rows, sampled.tokens)
        pending.tokens = to_host(sampled.tokens)
        if sampled.logprobs is not None:
            which = slices.samples[sampled.logprob_rows].tolist()
            pending.logprobs = Reported(which, sampled.num_top, LogprobTensors(*map(to_host, sampled.logprobs)))

    def close(self) -> None:
        self._backend.close()

    def _wants_hidden(self, slices: Slices) -> bool:
        """Whether somebody wants log-probabilities of prompt tokens, which take hidden states that graphs do not hand out."""
        records = self._sampler.params.table[slices.rows]
        return bool(np.any(records["wants_prompt_logprobs"] & (slices.starts < records["num_prompt"])))

    def _prompt_logprobs(self, hidden: torch.Tensor, slices: Slices, pending: Pending) -> None:
        """For each slice that lies in a prompt whose log-probabilities are wanted: those of the tokens after its positions."""
        records = self._sampler.params.table[slices.rows]
        wanting = np.flatnonzero(records["wants_prompt_logprobs"] & (slices.starts < records["num_prompt"]))
        # A slice that ends the prompt says nothing of the token after it: that one is sampled.
        nums: Ints = np.minimum(slices.ends, records["num_prompt"] - 1)[wanting] - slices.starts[wanting]
        tops = records["prompt_logprobs"][wanting]
        which = [i for i, num in zip(wanting.tolist(), nums.tolist(), strict=True) for _ in range(num)]
        pending.prompt_slices = wanting.tolist()
        if not which:
            return
        spans = [(i, int(num)) for i, num in zip(wanting.tolist(), nums, strict=True)]
        index = np.concatenate([np.arange(slices.first[i], slices.first[i] + num) for i, num in spans])
        tokens = np.concatenate(
            [self._rows.tokens[slices.rows[i]][slices.starts[i] + 1 : slices.starts[i] + 1 + num] for i, num in spans]
        )
        on_device = self._upload([index, tokens])
        found = of_prompt(
            hidden.index_select(0, on_device[0]), on_device[1], int(tops.max()), self._vocab_size, self._backend.logits
        )
        pending.prompt_logprobs = Reported(which, np.repeat(tops, nums).tolist(), LogprobTensors(*map(to_host, found)))


def _use_graphs(backend: Backend, config: EngineConfig) -> bool:
    possible = config.device == "cuda" and backend.graphable
    if config.cuda_graphs and not possible:
        raise ConfigError(
            "cuda_graphs is on, but this model cannot be captured here: it takes CUDA, bfloat16 where the model has experts, and "
            "heads that there is a kernel for. Leave cuda_graphs unset to use them where they can be",
            param="cuda_graphs",
        )
    return possible if config.cuda_graphs is None else config.cuda_graphs
