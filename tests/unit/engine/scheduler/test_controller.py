"""Tests of the controllers' common part: which controller a config gets."""

from engine.config import EngineConfig, ModelLimits, SchedulerConfig, resolve
from engine.scheduler.controller import make_controller
from engine.scheduler.limits import Load, StepLimits, StepShape

LIMITS = ModelLimits(max_model_len=1000, vocab_size=10, eos_token_ids=(), dtype="float32")


def resolved(**changes) -> EngineConfig:
    scheduler = SchedulerConfig(max_num_seqs=100, max_step_tokens=2048)
    return resolve(EngineConfig(**{"model": "m", "scheduler": scheduler} | changes), LIMITS, has_cuda=False)


def test_fixed_limits_are_those_of_the_settings_whatever_happens():
    controller = make_controller(resolved())
    load = Load(decodes=50, kv_tokens=9000, running=60, waiting=5, prompt_tokens=500, context=0, itl=0.001)
    for now in range(3):
        controller.observe(StepShape(50, 9000, 500, 500), 10.0, float(now))
        assert controller.limits(load, float(now)) == StepLimits(2048, 100, 2048)
    assert (controller.policy, dict(controller.changes), controller.last_reason) == ("fixed", {}, "")
