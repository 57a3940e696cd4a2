"""Compiles two kernels ahead of time and installs them elsewhere: `python carry_kernels.py FOLDER`, for test_kernel_folder.py.

Prints the number of kernels compiled by `compile_variants` in a cache of its own, and then in a cache with the installed set.
"""

import sys
from pathlib import Path

import torch
from triton import knobs

from engine.kernels import argmax, compiles, elementwise, kernel_folder
from engine.kernels.ahead import compile_variants, recording
from engine.kernels.hardware import GPUS
from engine.kernels.kernel_folder import Purpose

GPU = GPUS["h200"]
META = torch.device("meta")


def main() -> None:
    root = Path(sys.argv[1])
    counter = compiles.count(lambda: None)
    with recording(GPU) as variants:
        for rows in (2, 3):  # the second launch of each kernel needs the same variant
            elementwise.norm(torch.empty(rows, 64, device=META), torch.empty(64, device=META), 1e-6)
            ids = torch.empty(rows, dtype=torch.int64, device=META)
            argmax.argmax_tokens(torch.empty(rows, 512, device=META), ids.int(), ids)
    purpose = Purpose.of(GPU, model={"size": 64}, settings={})
    knobs.cache.dir = str(root / "cache")
    folders = compile_variants(variants, GPU, threads=2)
    print(len(variants), counter.count, flush=True)
    found = kernel_folder.describe(purpose, folders, root / "cache")
    kernel_folder.export(found, root / "cache", root / "exported")
    carried = kernel_folder.read(root / "exported", purpose)
    assert carried == found, carried
    assert carried.num_kernels == len(variants)
    assert not kernel_folder.is_complete(carried, root / "elsewhere")
    kernel_folder.install(carried, root / "exported", root / "elsewhere")
    assert kernel_folder.is_complete(carried, root / "elsewhere")
    knobs.cache.dir = str(root / "elsewhere")
    counter.count = 0
    compile_variants(variants, GPU, threads=2)
    print(len(variants), counter.count)


if __name__ == "__main__":
    main()
