"""Trains the tiny model for four steps and saves the run in a given folder. test_training.py runs this script under torchrun."""

import sys
from pathlib import Path

from tiny_models import TINY_TIDEPOOL, make, plan, stream

from train.loop import Devices, Training
from train.pretrain import Pretraining

devices = Devices("cpu")
Training(Pretraining(make(TINY_TIDEPOOL)), plan(4), stream(), devices, Path(sys.argv[1])).train()
devices.close()
