"""Makes the helpers of this folder importable by its tests, and limits torch to one thread, since the models are tiny."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
torch.set_num_threads(1)
