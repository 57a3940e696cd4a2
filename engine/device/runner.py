"""TorchRunner executes plans on a device, one after the other, in the order in which they are submitted.

    plan -> block copies -> ForwardBatch -> backend.forward -> logits of the positions that sample -> sampler
                                ^                                                                        |
                                '--- each row's latest token, on the device <----------------------------'

On CUDA, one CUDA graph runs all of this, unless the step is large (`graphs.py`). If a row has penalties, a logit_bias, bad words,
allowed_token_ids or stop tokens forbidden by min_tokens, or requests log-probabilities, the sampler runs after the graph, on the
graph's logits.

Nothing in `submit` waits for the device, so with overlap the next plan is submitted while the device still runs this one. The
order of the device's stream keeps the two apart. `DeviceStep.result` waits for the copy of the step's tokens, and not for any
later work.
"""

from __future__ import annotations

from typing import Protocol

import torch

from engine.backends.base import Backend
from engine.batch import Uploader
from engine.config import EngineConfig, ModelLimits
from engine.device.device_step import DeviceStep, ReportedLogprobs, to_host
from engine.device.graphs import StepGraphs
from engine.device.inputs import Rows, Slices
from engine.device.moves import BlockCopies
from engine.device.step_programs import StepOutput, StepPrograms
from engine.device.warmup import PromptWarmup
from engine.errors import ConfigError
from engine.kvcache.host_memory import HostMemory
from engine.kvcache.storage import KVStorage
from engine.plan import Arrival, PendingStep, StepPlan
from engine.sampling import prompt_logprobs
from engine.sampling.prompt_logprobs import PromptSlices
from engine.sampling.sampler import Sampler


class Compiles(Protocol):
    count: int  # kernels that this process has compiled


class TorchRunner:
    """Executes plans with a Backend, and owns the state of all batch rows. Implements Runner."""

    def __init__(
        self,
        backend: Backend,
        storage: KVStorage,
        config: EngineConfig,
        limits: ModelLimits,
        *,
        device: torch.device | None = None,
        compiles: Compiles | None = None,
        host: HostMemory | None = None,
    ) -> None:
        """`config` must be the result of `resolve`. `device` is by default that of `config`. `compiles` counts compilations.

        `host` is the memory of the host tier.
        """
        self._compiles = compiles
        device = device or torch.device(config.device)
        self._on_cuda = device.type == "cuda"
        self._last_done: torch.cuda.Event | None = None  # event at the end of the last submitted step
        self._backend = backend
        self._storage = storage
        self._upload = Uploader(device)
        self._copies = BlockCopies(storage, self._upload, device, host)
        self._vocab_size = limits.vocab_size
        max_rows, max_len = config.scheduler.max_num_seqs, config.max_model_len or limits.max_model_len
        block_size = config.cache.block_size
        self._rows = Rows(
            max_rows=max_rows,
            max_len=max_len,
            block_size=block_size,
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
        self._block_size = block_size
        self.graphs: StepGraphs | None = None
        if _use_graphs(backend, config):
            self.graphs = StepGraphs(self.programs(), self._rows, on_demand=config.offline)
        self._warmup = PromptWarmup(
            backend,
            storage.layers,
            scratch_block=storage.scratch_block,
            block_size=block_size,
            max_tokens=min(config.scheduler.max_step_tokens or 1, max_len),
            max_len=max_len,
            device=device,
        )

    @property
    def num_blocks(self) -> int:
        return self._storage.num_blocks

    @property
    def num_compiled(self) -> int:
        return 0 if self._compiles is None else self._compiles.count

    def programs(self) -> StepPrograms:
        """Make the programs of this runner's steps, which CUDA graphs can hold."""
        sample = self._sampler.cuda.sample
        return StepPrograms(self._backend, self._storage.layers, self._rows, sample, block_size=self._block_size)

    @torch.inference_mode()
    def submit(self, plan: StepPlan) -> PendingStep:
        self._copies.run(plan.copies)
        if not plan.rows:
            return self._without_slices(plan)
        self._sampler.admit(plan.admitted)
        self._rows.apply(plan)
        slices = Slices.of(plan)
        step = DeviceStep(plan, on_cuda=self._on_cuda, after=self._last_done)
        # Prompt log-probabilities need the hidden states of all tokens, which graphs do not return.
        prompts = prompt_logprobs.find_slices(self._sampler.params, slices.rows, slices.starts, slices.ends)
        output = None
        if self.graphs is not None and prompts is None and plan.spilled is None:
            output = self.graphs.run(slices, self._sampler.uniforms, step.begins)
        if output is not None:
            self._finish_graph(output, slices, step)
        else:
            self._run_eagerly(plan, slices, step, prompts)
        step.submitted()
        self._last_done = step.done
        return step

    def poll(self, seconds: float = 0.0) -> list[Arrival]:
        return self._copies.poll(seconds)

    @torch.inference_mode()
    def prepare(self) -> bool:
        """Capture one CUDA graph that later steps may need or, if all are captured, run one warm-up prompt.

        Returns False if nothing is left to capture or to warm up.
        """
        return (self.graphs is not None and self.graphs.capture_next()) or self._warmup.run_next()

    def close(self) -> None:
        self._copies.close()
        self._backend.close()

    def _without_slices(self, plan: StepPlan) -> PendingStep:
        """Return the step of a plan that only copies blocks."""
        step = DeviceStep(plan, on_cuda=self._on_cuda, after=None)
        step.begins()
        step.submitted()
        self._last_done = step.done
        return step

    def _finish_graph(self, output: StepOutput, slices: Slices, step: DeviceStep) -> None:
        """Take the tokens from a graph's output, or sample again if some row's logits must be adjusted first.

        The output has a token for every slice, not only for those that sample.
        """
        if not slices.samples.size:
            return
        rows, all_sample = slices.rows[slices.samples], slices.samples.size == slices.rows.size
        if self._sampler.is_plain(rows, slices.ends[slices.samples]):
            step.tokens, step.tokens_of_all_slices = to_host(output.tokens), not all_sample
            return
        index, on_device = self._upload([slices.samples, rows])
        self._sample(output.logits if all_sample else output.logits.index_select(0, index), slices, on_device, step)

    def _run_eagerly(self, plan: StepPlan, slices: Slices, step: DeviceStep, prompts: PromptSlices | None) -> None:
        all_read = prompts is not None
        if plan.spilled is None:
            prepared = self._rows.batch(plan, slices, self._storage.layers, all_read=all_read)
        else:
            prepared = self._rows.spilled_batch(plan, slices, plan.spilled, self._copies.with_host(), all_read=all_read)
        step.begins()
        hidden = self._backend.forward(prepared.batch)
        if prompts is not None:
            self._report_prompts(prompts, hidden, slices, step)
            hidden = hidden.index_select(0, prepared.last_index)
        if plan.samples:
            self._sample(self._backend.logits(hidden), slices, prepared.sampled_rows, step)

    def _sample(self, logits: torch.Tensor, slices: Slices, sampled_rows: torch.Tensor, step: DeviceStep) -> None:
        """Sample tokens from logits [S, V] of the S slices that sample, in batch rows sampled_rows [S] int64, on the device."""
        sampled = self._sampler.sample(logits, slices.rows[slices.samples], slices.ends[slices.samples])
        self._rows.set_latest(sampled_rows, sampled.latest)
        step.tokens = to_host(sampled.tokens)
        if sampled.logprobs is not None:
            reporting = slices.samples[sampled.logprob_rows].tolist()
            step.logprobs = ReportedLogprobs.of(reporting, sampled.num_top, sampled.logprobs)

    def _report_prompts(self, prompts: PromptSlices, hidden: torch.Tensor, slices: Slices, step: DeviceStep) -> None:
        step.prompt_slices = prompts.slices.tolist()
        known = [self._rows.tokens[row] for row in slices.rows[prompts.slices].tolist()]
        wanted = prompt_logprobs.positions(prompts, slices.first, slices.starts, known)
        if wanted.slices:
            values = prompt_logprobs.compute(
                wanted, hidden, self._backend.logits, vocab_size=self._vocab_size, upload=self._upload
            )
            step.prompt_logprobs = ReportedLogprobs.of(wanted.slices, wanted.num_top, values)


def _use_graphs(backend: Backend, config: EngineConfig) -> bool:
    possible = config.device == "cuda" and backend.graphable
    if config.cuda_graphs and not possible:
        raise ConfigError(
            "cuda_graphs is on, but this model's steps cannot be captured here. Graphs need a CUDA device, an attention kernel "
            "for the model's head size and, if the model has experts, bfloat16. Leave cuda_graphs unset: graphs are then used "
            "if they are possible",
            param="cuda_graphs",
        )
    return possible if config.cuda_graphs is None else config.cuda_graphs
