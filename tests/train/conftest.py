"""Puts this folder's helpers within reach and keeps torch to one thread: the models here are tiny."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
torch.set_num_threads(1)
