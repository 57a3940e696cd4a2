"""Makes this folder's helpers importable, and limits torch to one thread, since the models here are tiny."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
torch.set_num_threads(1)
