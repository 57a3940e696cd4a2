"""The engine's public names. Importing this package does not import torch; building an engine does."""

from engine.config import CacheConfig, EngineConfig, SchedulerConfig
from engine.errors import TidegateError
from engine.llm import LLM, Completion
from engine.request import FinishReason, SamplingParams, TokenLogprobs

__all__ = [
    "LLM",
    "CacheConfig",
    "Completion",
    "EngineConfig",
    "FinishReason",
    "SamplingParams",
    "SchedulerConfig",
    "TidegateError",
    "TokenLogprobs",
]
