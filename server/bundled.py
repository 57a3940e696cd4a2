"""Finds Tidepool, the small model that comes with the project. It is served if no other model is named. `train/` trains it."""

from __future__ import annotations

from pathlib import Path

from engine.errors import ConfigError

NAME = "tidepool"
FOLDER = Path(__file__).resolve().parents[1] / "checkpoints" / NAME
NOTICE = (
    "serving the bundled model Tidepool: 22M parameters that know some Python and no facts. "
    "Point --model (or TIDEGATE_MODEL) at a checkpoint folder to serve another one."
)


def bundled_checkpoint() -> Path:
    """Return the folder of the bundled model. Raises ConfigError if the project was installed without the model."""
    if not (FOLDER / "config.json").is_file():
        raise ConfigError(
            f"model is not set, and the bundled model is not at {FOLDER}: it comes with a checkout of the repository; name "
            "a checkpoint folder instead",
            param="model",
        )
    return FOLDER
