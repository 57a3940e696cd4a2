"""Every line of the kernels' table launches what it says, at sizes that the interpreter can do."""

from __future__ import annotations

import pytest
import torch

from engine.kernels import bench

TINY = {
    "seqs": 2,
    "context": 70,
    "rows": 2,
    "heads": 4,
    "kv_heads": 2,
    "latent": 32,
    "rope": 16,
    "hidden": 32,
    "size": 32,
    "outputs": 32,
    "inputs": 64,
}
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("case", {case.kernel: case for case in bench.CASES}.values(), ids=lambda case: case.kernel)
def test_a_kernel_of_the_table_runs(case, monkeypatch):
    monkeypatch.setattr(bench, "_DTYPE", torch.float16)  # the interpreter cannot add in bfloat16
    launch = case.make(DEVICE, **{name: TINY[name] for name in case.sizes})
    out = launch.run()
    for tensor in out if isinstance(out, tuple) else (out,):
        assert tensor is None or bool(tensor.isfinite().all())
    assert launch.num_bytes > 0


def test_prompts_tiles_cover_every_token_once():
    launch = bench.prefill(DEVICE, seqs=2, context=70, heads=4, kv_heads=2)
    assert launch.operations == 4 * 2 * (70 * 71 // 2) * 4 * 128
