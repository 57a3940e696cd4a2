"""Tests of what the metrics of an API worker count, and of the answer to a scrape."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from engine.messages import EngineStats, TierStats
from engine.slo import SLO_CLASSES
from server.engines.base import EngineHealth
from server.metrics.registry import E2E_BUCKETS, ITL_BUCKETS, TTFT_BUCKETS, Metrics

STATS = EngineStats(
    step=7,
    running=3,
    waiting=2,
    blocks_used=10,
    blocks_cached=5,
    blocks_total=40,
    num_preemptions=1,
    prompt_tokens=90,
    cached_tokens=30,
    num_failed=4,
    log_lines_dropped=6,
    kernels_compiled=8,
)
CLASSES = list(SLO_CLASSES)
HEALTH = EngineHealth(ready=True, restarts=2, stats=STATS)


def samples(metrics):
    return parsed(metrics.render()[0].decode())


def parsed(text):
    """Parse the answer to a scrape into {(name, labels without model_name and engine): value}. No sample may occur twice."""
    out = {}
    for family in text_string_to_metric_families(text):
        for s in family.samples:
            labels = tuple(sorted((k, v) for k, v in s.labels.items() if k not in ("model_name", "engine")))
            assert (s.name, labels) not in out
            out[s.name, labels] = s.value
    return out


def total(found, name):
    return sum(value for (n, _), value in found.items() if n == name)


def conserved(found):
    ended = sum(total(found, f"tidegate_requests_{end}_total") for end in ("finished", "aborted", "failed"))
    return total(found, "tidegate_requests_started_total") == ended + total(found, "tidegate_requests_running")


def end(meter, act):
    if act == "finish":
        meter.finished("stop")
    elif act == "fail":
        meter.failed("overloaded")
    else:
        meter.aborted()


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["begin", "finish", "abort", "fail", "twice"]), st.integers(0, 5))))
def test_started_is_finished_aborted_failed_and_running_at_every_moment(acts):
    metrics, open_ = Metrics("m", lambda: HEALTH), []
    running = 0
    for act, which in acts:
        if act == "begin" or not open_:
            open_.append(metrics.begin(("http", "grpc")[which % 2], CLASSES[which % 3]))
            running += 1
        else:
            meter = open_[which % len(open_)] if act == "twice" else open_.pop(which % len(open_))
            running -= not meter._ended
            end(meter, act)
        found = samples(metrics)
        assert conserved(found)
        assert total(found, "tidegate_requests_running") == running
        judged = total(found, "tidegate_requests_good_total") + total(found, "tidegate_requests_late_total")
        assert judged == total(found, "tidegate_requests_finished_total")


def test_tokens_and_latencies_are_counted_within_each_output():
    metrics = Metrics("m", lambda: HEALTH)
    meter = metrics.begin("http", "standard")
    meter.first_token(meter._began + 0.03, queue_seconds=0.4)
    meter.prompt(9, 4)
    meter.tokens(0, 1, 100.0)
    meter.tokens(1, 1, 100.0)  # no latency is measured between tokens of different outputs
    meter.tokens(0, 1, 100.02)
    meter.tokens(0, 2, 100.22)  # two tokens after 0.2 s: each counts as 0.1 s
    meter.finished("length")
    found = samples(metrics)
    assert found["tidegate_prompt_tokens_total", ()] == 9
    assert found["tidegate_cached_tokens_total", ()] == 4
    assert found["tidegate_output_tokens_total", ()] == 5
    assert found["tidegate_inter_token_latency_seconds_count", ()] == 3
    assert found["tidegate_inter_token_latency_seconds_sum", ()] == pytest.approx(0.22)
    assert found["tidegate_inter_token_latency_seconds_bucket", (("le", "0.025"),)] == 1
    assert found["tidegate_inter_token_latency_seconds_bucket", (("le", "0.15"),)] == 3
    assert found["tidegate_time_to_first_token_seconds_bucket", (("le", "0.04"),)] == 1
    assert found["tidegate_queue_seconds_sum", ()] == 0.4
    assert found["tidegate_requests_finished_total", (("reason", "length"), ("transport", "http"))] == 1


@pytest.mark.parametrize(
    ("slo", "ttft", "gap", "good"),
    [
        ("interactive", 0.5, 0.046875, True),
        ("interactive", 0.53125, 0.046875, False),
        ("interactive", 0.25, 0.0625, False),
        ("standard", 2.0, 0.09375, True),
        ("standard", 2.5, 0.09375, False),
        ("standard", 1.0, 0.125, False),
        ("batch", 3600.0, 600.0, True),
    ],
)
def test_a_finished_request_is_good_if_its_first_token_and_its_longest_gap_keep_the_targets(slo, ttft, gap, good):
    metrics = Metrics("m", lambda: HEALTH)
    meter = metrics.begin("http", slo)
    meter.first_token(meter._began + ttft, queue_seconds=0.0)
    meter._ttft = ttft  # without the rounding of the sum above
    for now in (100.0, 100.0 + gap, 100.0 + gap + 0.015625):  # the longest gap is not the last one
        meter.tokens(0, 1, now)
    meter.tokens(1, 1, 900.0)  # between outputs there is no gap
    meter.finished("stop")
    found, label = samples(metrics), ("slo_class", slo)
    assert total(found, "tidegate_requests_good_total") == found["tidegate_requests_good_total", (label,)] == good
    assert total(found, "tidegate_requests_late_total") == found["tidegate_requests_late_total", (label,)] == (not good)
    assert found["tidegate_slo_longest_gap_seconds_sum", (label,)] == gap
    assert found["tidegate_slo_time_to_first_token_seconds_count", (label,)] == 1
    assert total(found, "tidegate_slo_time_to_first_token_seconds_sum") == pytest.approx(ttft)


def test_a_request_that_fails_is_neither_good_nor_late_and_a_refusal_is_counted_by_class():
    metrics = Metrics("m", lambda: HEALTH)
    metrics.begin("http", "interactive").failed("overloaded")
    metrics.begin("grpc", "interactive").failed("request_timeout")
    metrics.begin("http", "interactive").aborted()
    found = samples(metrics)
    for name in ("good", "late"):
        assert {labels for n, labels in found if n == f"tidegate_requests_{name}_total"} == {
            (("slo_class", slo),) for slo in ("interactive", "standard", "batch")
        }
        assert total(found, f"tidegate_requests_{name}_total") == 0
    refused = {labels: value for (n, labels), value in found.items() if n == "tidegate_requests_refused_total"}
    assert refused == {(("slo_class", slo),): float(slo == "interactive") for slo in ("interactive", "standard", "batch")}


def test_the_tally_gives_the_same_buckets_as_single_observations():
    """A value that equals a bucket's upper bound belongs to that bucket, both in the tally and in a single observation."""
    metrics, plain = Metrics("m", lambda: HEALTH), Metrics("m", lambda: HEALTH)
    values = [*ITL_BUCKETS, *(b * 1.001 for b in ITL_BUCKETS), 0.0]
    for value in values:
        metrics.tally.next(1, value, 0.0)
        plain.itl.observe(value)
    name = "tidegate_inter_token_latency_seconds"
    one, other = samples(metrics), samples(plain)
    assert {k: v for k, v in one.items() if k[0].startswith(f"{name}_bucket")} == {
        k: v for k, v in other.items() if k[0].startswith(f"{name}_bucket")
    }
    assert one[f"{name}_sum", ()] == pytest.approx(other[f"{name}_sum", ()])


def test_the_vllm_names_show_the_same_numbers():
    metrics = Metrics("m", lambda: HEALTH)
    meter = metrics.begin("http", "standard")
    meter.prompt(9, 4)
    meter.first_token(meter._began, queue_seconds=0.0)
    meter.tokens(0, 1, 1.0)
    meter.tokens(0, 1, 1.5)
    meter.finished("stop")
    found = samples(metrics)
    assert found["vllm:num_requests_running", ()] == found["tidegate_engine_requests_running", ()] == 3
    assert found["vllm:num_requests_waiting", ()] == 2
    assert found["vllm:kv_cache_usage_perc", ()] == 0.25
    assert found["vllm:num_preemptions_total", ()] == 1
    assert found["vllm:prompt_tokens_total", ()] == 9
    assert found["vllm:generation_tokens_total", ()] == 2
    assert found["vllm:request_success_total", (("finished_reason", "stop"), ("transport", "http"))] == 1
    for name in ("time_to_first_token", "inter_token_latency", "e2e_request_latency"):
        assert found[f"vllm:{name}_seconds_count", ()] == 1
    assert found["vllm:inter_token_latency_seconds_bucket", (("le", "0.5"),)] == 1
    assert b'vllm:num_requests_running{engine="0",model_name="m"} 3.0' in metrics.render()[0]


def test_buckets_ascend():
    for buckets in (TTFT_BUCKETS, ITL_BUCKETS, E2E_BUCKETS):
        assert list(buckets) == sorted(set(buckets))


def test_without_an_engine_the_workers_metrics_are_shown():
    found = samples(Metrics("m", lambda: EngineHealth(ready=False, reason="starting")))
    assert found["tidegate_engine_up", ()] == 0
    assert not any(name.startswith("tidegate_kv") for name, _ in found)


def test_the_engines_start_is_shown_by_phase():
    started = EngineHealth(ready=True, startup={"imports": 3.5, "weights": 2.25})
    found = {
        labels: value
        for (name, labels), value in samples(Metrics("m", lambda: started)).items()
        if name == "tidegate_startup_seconds"
    }
    assert found == {(("phase", "imports"),): 3.5, (("phase", "weights"),): 2.25}


def test_the_batchs_limits_and_the_predictions_are_shown():
    stats = EngineStats(
        seq_limit=16,
        token_limit=2048,
        chunk_limit=1024,
        batching="aimd,model",
        limit_changes={"slow_step": 3, "fast_steps": 2},
        work_seconds=4.5,
        predicted_ttft_over_target=0.75,
        predicted_itl_over_target=1.25,
        device_seconds=9.5,
    )
    found = samples(Metrics("m", lambda: EngineHealth(ready=True, stats=stats)))
    shown = {key: value for key, value in found.items() if "batch" in key[0] or "predicted" in key[0] or "limit" in key[0]}
    assert shown == {
        ("tidegate_engine_batch_sequences_limit", ()): 16,
        ("tidegate_engine_batch_tokens_limit", ()): 2048,
        ("tidegate_engine_batch_chunk_limit", ()): 1024,
        ("tidegate_engine_batching_policy", (("policy", "aimd"),)): 1,
        ("tidegate_engine_batching_policy", (("policy", "model"),)): 1,
        ("tidegate_engine_limit_changes_total", (("reason", "slow_step"),)): 3,
        ("tidegate_engine_limit_changes_total", (("reason", "fast_steps"),)): 2,
        ("tidegate_engine_predicted_ttft_over_target", ()): 0.75,
        ("tidegate_engine_predicted_itl_over_target", ()): 1.25,
    }
    assert found["tidegate_engine_work_seconds", ()] == 4.5
    assert found["tidegate_engine_device_seconds_total", ()] == 9.5


def test_hits_of_all_tiers_add_up_and_each_lower_tier_has_its_own_metrics():
    tier = TierStats(
        blocks_used=7,
        blocks_limit=9,
        cached_tokens=30,
        num_demoted=4,
        num_promoted=3,
        num_failed=2,
        num_evicted=1,
        num_dropped=11,
        num_unsaved=12,
        promoted_bytes=300,
        demoted_bytes=400,
        promote_seconds=0.5,
        num_on=2,
        outages={"disk_full": 13},
    )
    stats = EngineStats(cached_tokens=100, waiting=5, loading=2, tiers={"disk": tier}, load_decisions={"part": 14})
    found = samples(Metrics("m", lambda: EngineHealth(ready=True, stats=stats)))
    disk = (("tier", "disk"),)
    assert {key: value for key, value in found.items() if key[0].startswith("tidegate_tier_")} == {
        ("tidegate_tier_hits_tokens_total", (("tier", "gpu"),)): 70,
        ("tidegate_tier_hits_tokens_total", disk): 30,
        ("tidegate_tier_blocks_used", disk): 7,
        ("tidegate_tier_blocks_limit", disk): 9,
        ("tidegate_tier_demoted_blocks_total", disk): 4,
        ("tidegate_tier_promoted_blocks_total", disk): 3,
        ("tidegate_tier_failed_moves_total", disk): 2,
        ("tidegate_tier_evicted_blocks_total", disk): 1,
        ("tidegate_tier_dropped_blocks_total", disk): 11,
        ("tidegate_tier_unsaved_blocks_total", disk): 12,
        ("tidegate_tier_promoted_bytes_total", disk): 300,
        ("tidegate_tier_demoted_bytes_total", disk): 400,
        ("tidegate_tier_promote_seconds_total", disk): 0.5,
        ("tidegate_tier_up", disk): 2,
        ("tidegate_tier_outages_total", (("reason", "disk_full"), ("tier", "disk"))): 13,
        ("tidegate_tier_decisions_total", (("decision", "part"),)): 14,
    }
    assert found["tidegate_prefix_cache_hits_tokens_total", ()] == 100
    assert found["tidegate_engine_requests_loading", ()] == 2


def test_refusals_and_dropped_log_lines_are_counted():
    metrics = Metrics("m", lambda: HEALTH)
    metrics.http_refused(503)
    metrics.http_refused(431)
    metrics.http_refused(503)
    metrics.call_refused("no_message")
    metrics.log_lines_dropped(5)
    metrics.log_lines_dropped(1)
    found = samples(metrics)
    assert found["tidegate_http_refused_total", (("status", "503"),)] == 2
    assert found["tidegate_http_refused_total", (("status", "431"),)] == 1
    assert found["tidegate_grpc_calls_refused_total", (("reason", "no_message"),)] == 1
    assert found["tidegate_log_lines_dropped_total", (("process", "api"),)] == 6


def test_the_engines_failed_requests_dropped_log_lines_and_compiled_kernels_are_shown():
    found = samples(Metrics("m", lambda: HEALTH))
    assert found["tidegate_engine_requests_failed_total", ()] == 4
    assert found["tidegate_engine_log_lines_dropped_total", ()] == 6
    assert found["tidegate_engine_kernels_compiled_total", ()] == 8
