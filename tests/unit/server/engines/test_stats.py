"""Tests of the statistics that several engines have together."""

from engine.messages import EngineStats, TierStats
from server.engines.stats import combined


def test_no_engine_has_no_statistics_and_one_engine_has_its_own():
    one = EngineStats(step=3, batching="aimd", limit_changes={"slow_step": 2})
    assert combined([]) is None
    assert combined([one]) is one


def test_numbers_are_added_up_and_the_worst_prediction_counts():
    first = EngineStats(
        step=3, seq_limit=4, token_limit=512, chunk_limit=256, gc_pause_seconds=0.25, work_seconds=1.5, device_seconds=2.0,
        predicted_ttft_over_target=0.5, predicted_itl_over_target=1.5,
    )  # fmt: skip
    second = EngineStats(
        step=4, seq_limit=8, token_limit=512, chunk_limit=128, gc_pause_seconds=0.5, work_seconds=0.5, device_seconds=1.0,
        predicted_ttft_over_target=2.0, predicted_itl_over_target=0.25,
    )  # fmt: skip
    assert combined([first, second]) == EngineStats(
        step=7, seq_limit=12, token_limit=1024, chunk_limit=256, gc_pause_seconds=0.5, work_seconds=2.0, device_seconds=3.0,
        predicted_ttft_over_target=2.0, predicted_itl_over_target=1.5,
    )  # fmt: skip


def test_policies_are_listed_once_and_changes_are_added_by_reason():
    engines = [
        EngineStats(batching="model", limit_changes={"fast_steps": 1, "slow_step": 2}),
        EngineStats(batching="aimd", limit_changes={"slow_step": 3}),
        EngineStats(batching="model"),
    ]
    total = combined(engines)
    assert (total.batching, total.limit_changes) == ("aimd,model", {"fast_steps": 1, "slow_step": 5})


def test_tiers_are_added_up_by_name():
    engines = [
        EngineStats(
            tiers={"host": TierStats(blocks_used=1, blocks_limit=4, cached_tokens=10, num_demoted=3, outages={"slow": 1})}
        ),
        EngineStats(tiers={"host": TierStats(blocks_used=2, blocks_limit=4, num_promoted=5, num_on=0, outages={"slow": 2})}),
        EngineStats(load_decisions={"load": 6}),
    ]
    added = TierStats(
        blocks_used=3, blocks_limit=8, cached_tokens=10, num_demoted=3, num_promoted=5, num_on=1, outages={"slow": 3}
    )
    assert combined(engines).tiers == {"host": added}
    assert combined(engines).load_decisions == {"load": 6}
