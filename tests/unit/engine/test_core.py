import json
from typing import get_args

import pytest

from engine.config import CacheConfig, EngineConfig, FakeConfig, ModelLimits, RunnerKind, SchedulerConfig
from engine.core import RUNNERS, Core, build_core
from engine.errors import ContextTooLong, InternalError, InvalidRequest, Overloaded
from engine.fake import build_fake, expected_tokens
from engine.messages import Submit, pack_tokens, unpack_tokens
from engine.plan import BuiltRunner
from engine.request import FinishReason, SamplingParams, TokenEvent

LIMITS = ModelLimits(max_model_len=64, vocab_size=50, eos_token_ids=(3,), dtype="float32")


def make_config(**changes) -> EngineConfig:
    given = {"model": "/models/tiny", "runner": "fake", "debug_checks": True, "overlap": False}
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


def test_with_overlap_the_next_step_is_submitted_before_a_result_is_read():
    log: list[str] = []

    class Logged:
        def __init__(self, runner):
            self.runner, self.num_blocks = runner, runner.num_blocks

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


def test_a_stream_goes_on_where_another_engine_left_it():
    submit = make_submit(max_tokens=10)
    expected = expected_tokens(unpack_tokens(submit.prompt), 10, submit.params, 0, LIMITS)
    core = Core(build_fake(make_config(), LIMITS))
    core.submit(Submit(request_id="a", prompt=submit.prompt, params=submit.params, seed=0, outputs=pack_tokens(expected[:4])))
    assert tokens_of(drain(core)["a"]) == expected[4:]


def test_abort_is_told_once_with_the_next_step_even_where_nothing_is_left_to_run():
    core = Core(build_fake(make_config(), LIMITS))
    core.submit(make_submit())
    core.abort("a")
    core.abort("a")
    core.abort("unknown")
    assert core.has_work
    assert core.step() == [TokenEvent("a", [], FinishReason.ABORT)]
    assert not core.has_work


def test_what_is_refused_never_existed():
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
        assert s.num_accepted == s.num_finished + s.num_aborted + s.running + s.waiting

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


def test_overlap_hides_the_cpu_behind_the_device():
    exposed = {}
    for overlap in (False, True):
        core = Core(build_fake(make_config(overlap=overlap, fake=FakeConfig(step_ms=1.0)), LIMITS))
        core.submit(make_submit(max_tokens=40))
        drain(core)
        stats = core.stats()
        exposed[overlap] = stats.exposed_cpu_seconds / stats.step_seconds
    assert exposed[True] < exposed[False]


def test_info_tells_the_limits_in_force():
    info = Core(build_fake(make_config(max_model_len=32), LIMITS)).info()
    assert (info.model, info.limits.max_model_len, info.block_size, info.num_blocks) == ("tiny", 32, 4, 64)


def test_a_runner_that_fails_takes_the_core_with_it():
    class Broken:
        num_blocks = 64

        def submit(self, plan):
            raise InternalError("the device is gone")

    built = build_fake(make_config(), LIMITS)
    core = Core(BuiltRunner(Broken(), built.config, built.limits, "none"))
    core.submit(make_submit())
    with pytest.raises(InternalError, match="the device is gone"):
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
