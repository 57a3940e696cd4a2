"""Tests of Core with FakeRunner: the step loop with and without overlap, aborts, failures, statistics and refusals."""

import gc
import json
from typing import get_args

import msgspec
import pytest

from engine.config import BatchingConfig, CacheConfig, EngineConfig, FakeConfig, ModelLimits, RunnerKind, SchedulerConfig
from engine.core import RUNNERS, Core, build_core
from engine.errors import ContextTooLong, InternalError, InvalidRequest, Overloaded
from engine.fake import build_fake, expected_tokens
from engine.fake_device import SimulatedDevice, SimulatedTime
from engine.messages import Submit, pack_tokens, unpack_tokens
from engine.plan import BuiltRunner
from engine.request import CachedTokens, FinishReason, SamplingParams, TokenEvent
from engine.scheduler.cost_file import CostKey, save_costs
from engine.scheduler.cost_table import CostTable
from tests.support.tier_rig import Gate

LIMITS = ModelLimits(max_model_len=64, vocab_size=50, eos_token_ids=(3,), dtype="float32")


def make_config(**changes) -> EngineConfig:
    given = {"model": "/models/tiny", "runner": "fake", "debug_checks": True, "overlap": False}
    given["batching"] = BatchingConfig(policy="fixed")
    return EngineConfig(**given | {"cache": CacheConfig(block_size=4, num_blocks=64)} | changes)


def make_submit(name: str = "a", prompt: tuple[int, ...] = (5, 6, 7), max_tokens: int = 6, **params) -> Submit:
    params = SamplingParams(**{"max_tokens": max_tokens, "ignore_eos": True} | params)
    return Submit(request_id=name, prompt=pack_tokens(prompt), params=params, seed=0)


def drain(core: Core) -> dict[str, list[TokenEvent]]:
    seen: dict[str, list[TokenEvent]] = {}
    while core.has_work:
        for event in core.step():
            seen.setdefault(event.request_id, []).append(event)
    return seen


def tokens_of(events: list[TokenEvent]) -> list[int]:
    return [token for event in events for token in event.tokens]


@pytest.mark.parametrize("overlap", [False, True])
def test_a_request_runs_to_its_end(overlap):
    core = Core(build_fake(make_config(overlap=overlap), LIMITS))
    submit = make_submit()
    core.submit(submit)
    events = drain(core)["a"]
    assert tokens_of(events) == expected_tokens(unpack_tokens(submit.prompt), 6, submit.params, 0, LIMITS)
    assert [event.finish for event in events] == [None] * 5 + [FinishReason.LENGTH]
    assert core.step() == []


def test_arrivals_deadlines_and_the_controller_go_by_the_clock_of_the_core():
    time = SimulatedTime(1000.0)
    device = SimulatedDevice(FakeConfig(step_ms=100.0), clock=time.clock, sleep=time.sleep)
    config = make_config(scheduler=SchedulerConfig(max_num_seqs=1), batching=BatchingConfig(policy="aimd"))
    core = Core(build_fake(config, LIMITS, make_device=lambda *_: device), clock=time.clock)
    core.submit(make_submit("a", max_tokens=3))
    time.now += 5.0
    core.submit(make_submit("b", max_tokens=3))
    events = drain(core)
    assert events["a"][0].queue_s == pytest.approx(5.0)
    assert events["b"][0].queue_s == pytest.approx(0.3)
    assert time.now == pytest.approx(1005.6)
    assert core.stats().device_seconds == pytest.approx(0.6)


def test_a_new_request_is_predicted_with_the_limits_of_its_own_steps(tmp_path):
    table = CostTable([8], [0.01], [32, 64, 512], [0.01, 0.1, 0.1], 0.0, 0.0, 0.0)
    save_costs(path := str(tmp_path / "costs.json"), CostKey("device", "model", "float32"), "invented", table)
    time = SimulatedTime()
    config = make_config(
        cache=CacheConfig(block_size=4, num_blocks=1000),
        batching=BatchingConfig(policy="model", cost_file=path),
        fake=FakeConfig(cost_file=path),
    )
    limits = msgspec.structs.replace(LIMITS, max_model_len=2000)
    core = Core(
        build_fake(config, limits, make_device=lambda *given: SimulatedDevice(*given, time.clock, time.sleep)), clock=time.clock
    )
    core.submit(msgspec.structs.replace(make_submit("chat", max_tokens=30), slo="interactive"))
    core.step()
    core.submit(msgspec.structs.replace(make_submit("batch", max_tokens=1000), slo="batch"))
    while not any(event.request_id == "chat" and event.finish for event in core.step()):
        pass  # beside the chat, a step has few tokens
    assert core.stats().token_limit < 100
    prompt = tuple(range(4, 44)) * 30
    core.submit(msgspec.structs.replace(make_submit("new", prompt), slo="interactive", deadline_s=0.8))
    sent = time.now
    while not any(event.request_id == "new" for event in core.step()):
        pass
    assert time.now - sent == pytest.approx(0.3, rel=0.1)


def test_with_overlap_the_next_step_is_submitted_before_a_result_is_read():
    log: list[str] = []

    class Logged:
        def __init__(self, runner):
            self.runner, self.num_blocks, self.num_compiled = runner, runner.num_blocks, 0

        def submit(self, plan):
            log.append(f"submit {plan.step}")
            pending = self.runner.submit(plan)

            class Pending:
                def result(self):
                    log.append(f"result {plan.step}")
                    return pending.result()

            return Pending()

    for overlap in (False, True):
        built = build_fake(make_config(overlap=overlap), LIMITS)
        core = Core(BuiltRunner(Logged(built.runner), built.config, built.limits, built.device))
        core.submit(make_submit(max_tokens=3))
        drain(core)
    assert log[:6] == ["submit 1", "result 1", "submit 2", "result 2", "submit 3", "result 3"]
    assert log[6:] == ["submit 1", "submit 2", "result 1", "submit 3", "result 2", "result 3"]


def test_a_stream_continues_where_another_engine_stopped():
    submit = make_submit(max_tokens=10)
    expected = expected_tokens(unpack_tokens(submit.prompt), 10, submit.params, 0, LIMITS)
    core = Core(build_fake(make_config(), LIMITS))
    core.submit(Submit(request_id="a", prompt=submit.prompt, params=submit.params, seed=0, outputs=pack_tokens(expected[:4])))
    assert tokens_of(drain(core)["a"]) == expected[4:]


def test_restrictions_hold_across_the_engines_of_a_stream():
    submit = make_submit(max_tokens=10, allowed_token_ids=(5, 6), bad_words=((5, 5), (6, 6, 6)))
    expected = expected_tokens(unpack_tokens(submit.prompt), 10, submit.params, 0, LIMITS)
    for num in range(1, 10):
        core = Core(build_fake(make_config(), LIMITS))
        core.submit(msgspec.structs.replace(submit, outputs=pack_tokens(expected[:num])))
        assert tokens_of(drain(core)["a"]) == expected[num:]
    text = "".join(map(str, expected))
    assert set(text) == {"5", "6"}
    assert "55" not in text
    assert "666" not in text


def test_an_abort_is_reported_once_with_the_next_step_even_if_nothing_is_left_to_run():
    core = Core(build_fake(make_config(), LIMITS))
    core.submit(make_submit())
    core.abort("a")
    core.abort("a")
    core.abort("unknown")
    assert core.has_work
    assert core.step() == [TokenEvent("a", [], FinishReason.ABORT)]
    assert not core.has_work


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("state", ["waiting", "running", "aborted"])
def test_a_forgotten_request_has_no_further_event_and_its_id_can_be_used_again(state, overlap):
    core = Core(build_fake(make_config(overlap=overlap), LIMITS))
    core.submit(make_submit())
    if state != "waiting":
        core.step()
        core.step()
    if state == "aborted":
        core.abort("a")
    core.forget(["a", "unknown"])
    again = make_submit(prompt=(8, 9))
    core.submit(again)
    assert tokens_of(drain(core)["a"]) == expected_tokens([8, 9], 6, again.params, 0, LIMITS)
    assert core.stats().num_aborted == 1


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("number", [0, 3])
def test_a_row_whose_logits_are_not_finite_fails_and_the_others_finish(number, overlap):
    bad, good = make_submit("bad", prompt=(7, 7, 7)), make_submit("good", prompt=(5, 6))
    expected = {s.request_id: expected_tokens(unpack_tokens(s.prompt), 6, s.params, 0, LIMITS) for s in (bad, good)}
    nan_token = expected["bad"][number]
    assert nan_token not in expected["bad"][:number] + expected["good"]
    core = Core(build_fake(make_config(overlap=overlap, fake=FakeConfig(nan_token=nan_token)), LIMITS))
    core.submit(bad)
    core.submit(good)
    events = drain(core)
    assert tokens_of(events["good"]) == expected["good"]
    assert tokens_of(events["bad"]) == expected["bad"][:number]
    assert (events["bad"][-1].finish, events["bad"][-1].failure.error) == (FinishReason.ERROR, "NumericalError")
    stats = core.stats()
    assert (stats.num_failed, stats.num_finished, stats.num_accepted, stats.blocks_used) == (1, 1, 2, 0)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("logprobs", [None, 0])
def test_with_max_tokens_0_the_prompt_is_computed_and_nothing_is_generated(overlap, logprobs):
    core = Core(build_fake(make_config(overlap=overlap), LIMITS))
    core.submit(make_submit(max_tokens=0, prompt_logprobs=1, logprobs=logprobs))
    core.submit(make_submit("other"))
    events = drain(core)
    [event] = events["a"]
    assert (event.tokens, event.finish, event.stop_token) == ([], FinishReason.LENGTH, None)
    assert event.logprobs == (None if logprobs is None else [])
    assert [at and at.token for at in event.prompt_logprobs] == [None, 6, 7]
    assert len(tokens_of(events["other"])) == 6
    stats = core.stats()
    assert (stats.num_finished, stats.prompt_tokens, stats.output_tokens, stats.blocks_used) == (2, 6, 6, 0)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize(
    ("fields", "num", "names"),
    [
        ({"allowed_token_ids": (5,), "bad_words": ((5, 5, 5),)}, 2, "allowed_token_ids and bad_words together exclude"),
        (
            {"allowed_token_ids": (3,), "min_tokens": 2, "ignore_eos": False},
            0,
            "allowed_token_ids and min_tokens together exclude",
        ),
        ({"bad_words": tuple((token,) for token in range(50))}, 0, "bad_words excludes"),
    ],
)
def test_a_request_whose_own_fields_exclude_every_token_ends_with_an_error(overlap, fields, num, names):
    core = Core(build_fake(make_config(overlap=overlap), LIMITS))
    core.submit(make_submit(**fields))
    core.submit(make_submit("other"))
    events = drain(core)
    failure = events["a"][-1].failure
    assert (failure.error, failure.message.partition(" every token")[0]) == ("InvalidRequest", names)
    assert failure.param == names.partition(" ")[0]
    assert tokens_of(events["a"]) == [5] * num
    assert len(tokens_of(events["other"])) == 6
    assert (core.stats().num_failed, core.stats().num_finished, core.stats().blocks_used) == (1, 1, 0)


def test_refused_requests_are_not_counted():
    config = make_config(scheduler=SchedulerConfig(max_queue=1), max_model_len=32)
    core = Core(build_fake(config, LIMITS))
    for submit, error in (
        (make_submit(prompt=()), InvalidRequest),
        (make_submit(prompt=(50,)), InvalidRequest),
        (make_submit(max_tokens=30), ContextTooLong),
    ):
        with pytest.raises(error):
            core.submit(submit)
    assert (core.stats().num_accepted, core.has_work) == (0, False)
    core.submit(make_submit("a"))
    with pytest.raises(Overloaded):
        core.submit(make_submit("b"))
    assert core.stats().num_accepted == 1


def test_stats_add_up_at_every_moment():
    core = Core(build_fake(make_config(overlap=True), LIMITS))

    def add_up() -> None:
        s = core.stats()
        assert s.num_accepted == s.num_finished + s.num_aborted + s.num_failed + s.running + s.waiting

    for i in range(5):
        core.submit(make_submit(f"r{i}"))
        add_up()
    core.step()
    core.abort("r2")
    add_up()
    while core.has_work:
        core.step()
        add_up()
    stats = core.stats()
    assert (stats.num_finished, stats.num_aborted, stats.blocks_used, stats.blocks_total) == (4, 1, 0, 64)
    assert 0 < stats.exposed_cpu_seconds <= stats.step_seconds


@pytest.mark.parametrize(("overlap", "exposed"), [(False, 40), (True, 1)])
def test_overlap_hides_the_cpu_time_of_all_steps_but_the_first(monkeypatch, overlap, exposed):
    """The test's own clock advances by one second at each submission (CPU time), and by ten at each wait for a result."""
    now = [0.0]

    class Timed:
        def __init__(self, runner):
            self.runner, self.num_blocks, self.num_compiled = runner, runner.num_blocks, 0

        def submit(self, plan):
            now[0] += 1
            pending = self.runner.submit(plan)

            class Pending:
                def result(self):
                    now[0] += 10
                    return pending.result()

            return Pending()

    monkeypatch.setattr("engine.core.time.perf_counter", lambda: now[0])
    built = build_fake(make_config(overlap=overlap), LIMITS)
    core = Core(BuiltRunner(Timed(built.runner), built.config, built.limits, built.device))
    core.submit(make_submit(max_tokens=40))
    drain(core)
    stats = core.stats()
    assert (stats.exposed_cpu_seconds, stats.step_seconds) == (exposed, 440)


def busy_core(num_prompt: int) -> Core:
    """Return a core with 8 running and 8 waiting requests of `num_prompt` prompt tokens each."""
    limits = msgspec.structs.replace(LIMITS, max_model_len=100_000)
    config = make_config(
        debug_checks=False, cache=CacheConfig(block_size=4, num_blocks=20_000), scheduler=SchedulerConfig(max_num_seqs=8)
    )
    core = Core(build_fake(config, limits))
    for i in range(16):
        core.submit(make_submit(f"r{i}", prompt=(i, *[5] * (num_prompt - 1)), max_tokens=500))
    while core.stats().running < 8:
        core.step()
    return core


def test_the_garbage_collector_has_no_more_to_visit_for_long_prompts():
    """The collector does not track token ids, hashes and cache entries, so longer prompts do not lengthen a collection."""
    short, long = (min(num_tracked(num_prompt) for _ in range(3)) for num_prompt in (8, 8000))
    assert long < short + 50


def num_tracked(num_prompt: int) -> int:
    """Return how many objects the collector tracks for a busy core.

    What other tests left behind may add some: the least of several calls is the number.
    """
    gc.collect()
    before = len(gc.get_objects())
    core = busy_core(num_prompt)
    gc.collect()
    tracked = len(gc.get_objects()) - before
    core.close()
    return tracked


def test_requests_leave_no_reference_cycles():
    gc.collect()
    gc.disable()
    try:
        core = busy_core(100)
        core.submit(make_submit("leader", max_tokens=20))
        core.submit(Submit(request_id="fork", prompt=make_submit().prompt, params=SamplingParams(), seed=0, fork_of="leader"))
        core.abort("r3")
        drain(core)
        assert gc.collect() == 0
    finally:
        gc.enable()


def test_info_has_the_limits_in_force():
    info = Core(build_fake(make_config(max_model_len=32), LIMITS)).info()
    assert (info.model, info.limits.max_model_len, info.block_size, info.num_blocks) == ("tiny", 32, 4, 64)


def test_an_exception_of_the_runner_ends_the_step():
    class Broken:
        num_blocks = 64

        def submit(self, plan):
            raise InternalError("the device is lost")

    built = build_fake(make_config(), LIMITS)
    core = Core(BuiltRunner(Broken(), built.config, built.limits, "none"))
    core.submit(make_submit())
    with pytest.raises(InternalError, match="the device is lost"):
        core.step()


def test_build_core_builds_the_runner_that_the_config_names(tmp_path):
    config = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 128,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 48,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "eos_token_id": 2,
        "torch_dtype": "bfloat16",
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    core = build_core(make_config(model=str(tmp_path)))
    assert core.info().limits.max_model_len == 48
    core.submit(make_submit())
    assert len(tokens_of(drain(core)["a"])) == 6
    core.close()


def test_every_runner_of_the_config_has_a_module():
    assert set(RUNNERS) == set(get_args(RunnerKind))


def tiered_core(overlap: bool, *, move_ms: float) -> tuple[Core, SimulatedTime]:
    """Return a core with 8 blocks and a host tier, whose moves take `move_ms` each, and the time by which it goes."""
    time = SimulatedTime()
    fake = FakeConfig(step_ms=1.0, block_bytes=10**6, host_gb_s=1.0 / move_ms)
    config = make_config(overlap=overlap, cache=CacheConfig(block_size=4, num_blocks=8, host_tier_bytes=100 * 10**6), fake=fake)
    device = SimulatedDevice(fake, clock=time.clock, sleep=time.sleep)
    return Core(build_fake(config, LIMITS, make_device=lambda *_: device), clock=time.clock), time


@pytest.mark.parametrize("overlap", [False, True])
def test_a_core_whose_requests_only_load_waits_for_a_few_milliseconds_at_a_time(overlap):
    core, time = tiered_core(overlap, move_ms=20.0)
    long = make_submit("a", tuple(range(20, 37)), max_tokens=2)
    core.submit(long)
    drain(core)
    core.submit(make_submit("b", tuple(range(1, 30)), max_tokens=2))  # evicts the blocks of the first request
    drain(core)
    core.submit(long)
    steps, began = 0, time.now
    events = []
    while not events:
        before = time.now
        events = core.step()
        steps += 1
        assert time.now - before <= 0.006
    assert time.now - began > 4 * 0.02  # four blocks were loaded, one after the other
    assert steps > 4 * 20 / 5
    assert events[0].cached == CachedTokens(host=16)
    assert tokens_of([*events, *drain(core)["a"]]) == expected_tokens(unpack_tokens(long.prompt), 2, long.params, 0, LIMITS)


def test_a_core_has_work_until_the_moves_of_an_aborted_request_have_arrived():
    core, _ = tiered_core(False, move_ms=20.0)
    core.submit(make_submit("a", tuple(range(20, 37)), max_tokens=2))
    drain(core)
    core.submit(make_submit("b", tuple(range(1, 30)), max_tokens=2))
    drain(core)
    core.submit(make_submit("c", tuple(range(20, 37)), max_tokens=2))
    core.step()
    core.abort("c")
    assert [event.finish for event in drain(core)["c"]] == [FinishReason.ABORT]
    assert (core.stats().blocks_used, core.has_work) == (0, False)


def disk_core(folder, *, overlap: bool = True) -> Core:
    """Return a core with 8 blocks, a host tier, and a disk tier in `folder` whose earlier records are found."""
    cache = CacheConfig(
        block_size=4, num_blocks=8, host_tier_bytes=20 * 4096, disk_tier_folder=str(folder), disk_tier_bytes=1 << 20
    )
    core = Core(build_fake(make_config(overlap=overlap, cache=cache, fake=FakeConfig(block_bytes=4096)), LIMITS))
    core.find_records(30.0)
    return core


@pytest.mark.parametrize("overlap", [False, True])
def test_a_core_writes_what_is_wanted_on_disk_before_it_ends_and_the_next_one_reads_it(overlap, tmp_path):
    core = disk_core(tmp_path / "kv", overlap=overlap)
    long = make_submit("a", tuple(range(20, 37)), max_tokens=2)
    core.submit(long)
    events = drain(core)["a"]
    core.submit(make_submit("b", tuple(range(1, 12)), max_tokens=20))  # still runs at the end
    core.step()
    assert core.tends
    core.close()
    core = disk_core(tmp_path / "kv", overlap=overlap)
    assert core.stats().tiers["disk"].blocks_used == 4
    core.submit(long)
    again = drain(core)["a"]
    assert tokens_of(again) == tokens_of(events)
    assert core.stats().tiers["disk"].cached_tokens == 16
    core.close()


def test_a_disk_that_hangs_does_not_hold_the_end_of_a_core(tmp_path, monkeypatch):
    monkeypatch.setattr("engine.core.SAVE_SECONDS", 0.01)
    monkeypatch.setattr("engine.core.CLOSE_SECONDS", 0.01)
    core = disk_core(tmp_path / "kv")
    gate = Gate(core._disk.store, "write")
    core.submit(make_submit("a", tuple(range(20, 37)), max_tokens=2))
    drain(core)
    while not core._disk.store.num_writing:
        assert core.tends
        core.step()
    core.close()
    assert core._disk.store.num_writing
    gate.open()
    assert core._disk.store.close(30.0)


def test_a_core_waits_for_a_read_a_few_milliseconds_at_a_time_and_then_computes_what_did_not_come(tmp_path):
    core = disk_core(tmp_path / "kv")
    long = make_submit("a", tuple(range(20, 37)), max_tokens=2)
    core.submit(long)
    events = drain(core)["a"]
    core.close()
    core = disk_core(tmp_path / "kv")
    gate = Gate(core._disk.store, "read")
    core.submit(long)
    while not core.stats().loading:
        assert core.step() == []
    for _ in range(3):
        assert core.step() == []
    assert (core.has_work, core.tends, core.stats().loading) == (True, True, 1)
    core._scheduler.cache.tiers.loads._by_request[core._scheduler._requests["a"]].patience = 0.0
    assert tokens_of(drain(core)["a"]) == tokens_of(events)
    assert core.stats().load_decisions == {"load": 1, "gave_up": 1}
    gate.open()
    core.close()
