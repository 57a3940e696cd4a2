"""Runs the soak test of `loadtest` on a CPU for a few seconds; it must end without an error."""

from pathlib import Path

from engine.config import CacheConfig, EngineConfig, SchedulerConfig
from engine.core import build_core
from loadtest.soak import Soak

DRAFT = Path(__file__).resolve().parents[2] / "checkpoints" / "tidepool-draft"


def test_random_requests_each_end_once_and_leave_no_block_in_use():
    cache, scheduler = CacheConfig(num_blocks=48), SchedulerConfig(max_num_seqs=4)
    core = build_core(EngineConfig(model=str(DRAFT), device="cpu", debug_checks=True, cache=cache, scheduler=scheduler))
    figures = Soak(core, seed=0).run(1.0)
    stats = core.stats()
    core.close()
    assert figures["requests"] == stats.num_finished + stats.num_aborted > 0
    assert figures["output_tokens"] > 0
