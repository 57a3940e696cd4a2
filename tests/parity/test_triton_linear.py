"""Tests matrix products with few rows against torch's products in float64.

On a CPU the products are in float16, since Triton's interpreter cannot multiply bfloat16.
"""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from engine.kernels import linear, linear_tiles, skinny
from engine.kernels.linear_tiles import Gemv, Skinny
from engine.kernels.product import Extras
from engine.layers.linear import linear as plain_linear
from engine.layers.mlp import GatedMlp
from engine.layers.ops import PlainOps
from engine.layers.ops_cuda import CudaOps

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float16

GEMV = (
    Gemv(rows=4, columns=256, parts=2, warps=4),
    Gemv(rows=2, columns=512, parts=1, warps=4),
    Gemv(rows=4, columns=1024, parts=1, warps=4),
)
SKINNY = (
    Skinny(rows=64, columns=64, splits=1, warps=4, stages=3),
    Skinny(rows=32, columns=128, splits=2, warps=4, stages=3),
    Skinny(rows=64, columns=64, splits=3, warps=4, stages=3),
    Skinny(rows=128, columns=64, splits=2, warps=8, stages=3),
)
SHARED_MEMORY = 227 << 10  # bytes of shared memory that a program may use on Hopper


def random(*shape: int, scale: float = 1.0) -> torch.Tensor:
    return (scale * torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))).to(DEVICE, DTYPE)


def weights(n: int, k: int) -> torch.Tensor:
    return random(n, k, scale=k**-0.5)


def exact(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *, gated: bool) -> torch.Tensor:
    y = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    return PlainOps().silu_mul(y) if gated else y


def assert_near(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 4e-3) -> None:
    assert found.dtype == DTYPE
    assert found.shape == expected.shape
    assert (found.double() - expected).norm() < tolerance * expected.norm()


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(
    ("config", "rows"),
    [
        *((GEMV[0], m) for m in (1, 2)),
        *((c, 2) for c in GEMV[1:]),
        (SKINNY[0], 4),
        (SKINNY[1], 16),
        (SKINNY[1], 64),
        (SKINNY[2], 33),
        (SKINNY[0], 65),
        (SKINNY[3], 128),
    ],
)
def test_products_with_any_tiles(config, rows, gated):
    """N is not a multiple of any tile's rows. K is a multiple of some tiles' columns, and takes several passes of the loop."""
    x, weight = random(rows, 1296), weights(78, 1296)
    out = torch.full((rows, 39 if gated else 78), float("nan"), dtype=DTYPE, device=DEVICE)
    linear.launch(x, weight, None, out, config, Extras(gated=gated))
    assert_near(out, exact(x, weight, None, gated=gated))


@pytest.mark.parametrize(("config", "rows"), [(GEMV[0], 2), (SKINNY[0], 3), (SKINNY[1], 3)])
def test_a_bias_and_rows_of_x_that_are_not_adjacent(config, rows):
    x, weight, bias = random(rows, 272)[:, :208], weights(52, 208), random(52)
    out = torch.empty(rows, 52, dtype=DTYPE, device=DEVICE)
    linear.launch(x, weight, bias, out, config, Extras())
    assert_near(out, exact(x, weight, bias, gated=False))


def test_more_rows_than_a_kernel_takes_are_refused():
    x, weight = random(3, 32), weights(8, 32)
    with pytest.raises(ValueError, match="takes 2 rows at most"):
        linear.launch(x, weight, None, x, GEMV[0], Extras())
    for config, rows in ((GEMV[0], 2), (SKINNY[0], 1)):
        with pytest.raises(ValueError, match="norm"):
            linear.launch(x[:rows], weight, None, x, config, Extras(norm=(x[0], 1e-6)))


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("config", GEMV)
def test_a_fused_norm(config, gated):
    x, weight, norm = random(1, 1300)[:, :1296], weights(78, 1296), random(1296)
    out = torch.empty(1, 39 if gated else 78, dtype=DTYPE, device=DEVICE)
    linear.launch(x, weight, None, out, config, Extras(gated=gated, norm=(norm, 0.5)))
    normed = F.rms_norm(x.double(), (1296,), norm.double(), 0.5)
    assert_near(out, exact(normed, weight, None, gated=gated))


@pytest.mark.parametrize(("config", "rows"), [(GEMV[0], 1), (GEMV[2], 2), (SKINNY[0], 5), (SKINNY[2], 5)])
def test_a_product_is_added_to_the_output(config, rows):
    x, weight, bias, hidden = random(rows, 208), weights(52, 208), random(52), random(rows, 52, scale=3.0)
    expected = hidden.double() + exact(x, weight, bias, gated=False)
    linear.launch(x, weight, bias, hidden, config, Extras(add=True))
    assert_near(hidden, expected)
    assert not skinny._workspace(DEVICE)[1].any()


def test_a_given_output_is_written():
    x, weight, out = random(5, 64), weights(40, 64), torch.zeros(5, 40, dtype=DTYPE, device=DEVICE)
    assert linear.linear(x, weight, out=out) is out
    assert_near(out, exact(x, weight, None, gated=False))


@pytest.mark.parametrize("rows", [1, 4, 5, 64, 96])
def test_products_with_the_chosen_tiles(rows):
    x, weight, bias = random(rows, 1, 512), weights(96, 512), random(96)
    assert_near(linear.linear(x, weight, bias), exact(x, weight, bias, gated=False))
    assert_near(linear.gated(x, weight), exact(x, weight, None, gated=True))
    assert_near(linear.linear(x[..., ::2], weight[:, ::2].contiguous()), exact(x[..., ::2], weight[:, ::2], None, gated=False))


def test_a_split_product_can_follow_another():
    """Each launch of a product with a split K leaves the workspace's counters at zero, and gives the same bits."""
    x, weight = random(9, 512), weights(130, 512)
    outs = [torch.empty(9, 130, dtype=DTYPE, device=DEVICE) for _ in range(3)]
    for out in outs:
        linear.launch(x, weight, None, out, SKINNY[1], Extras())
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2])
    assert not skinny._workspace(DEVICE)[1].any()


def test_a_split_past_the_workspace_is_refused():
    x, weight = random(64, 16), random(1, 16).expand(1 << 20, 16)
    with pytest.raises(ValueError, match="workspace"):
        linear.launch(x, weight, None, x, SKINNY[1], Extras())


@pytest.mark.parametrize("rows", [4, 16, 66])
def test_a_row_does_not_depend_on_the_number_of_rows_in_a_bucket(rows):
    x, weight = random(rows, 512), weights(48, 512)
    assert torch.equal(linear.linear(x, weight)[:-1], linear.linear(x[:-1], weight))


MODELS = (  # each product of a model is (rows of W, K, whether it is gated)
    *((4096, 1024, False), (1024, 2048, False), (6144, 1024, True), (1024, 3072, False), (151936, 1024, False)),
    *((6144, 4096, False), (4096, 4096, False), (28672, 4096, True), (4096, 14336, False), (128256, 4096, False)),
    *((3648, 2048, False), (2048, 2048, False), (21888, 2048, True), (2048, 10944, False), (5632, 2048, True)),
    *((2048, 2816, False), (102400, 2048, False), (4224, 4096, False), (64, 2048, False), (1, 16, False), (2, 16, True)),
)


@pytest.mark.parametrize(("n", "k", "gated"), MODELS)
@pytest.mark.parametrize("rows", [3, 17, 33, 65])
def test_chosen_tiles_fit_shared_memory_and_the_workspace(rows, n, k, gated):
    config = linear_tiles.choose(rows, n, k, gated=gated)
    assert isinstance(config, Skinny)
    block_m = linear_tiles.bucket(rows)
    assert 2 * config.stages * config.columns * (config.rows + block_m) <= SHARED_MEMORY
    if config.splits > 1:
        tiles = -(-n // config.rows)
        assert tiles <= skinny._COUNTERS
        assert tiles * config.splits * config.rows * block_m <= skinny._WORKSPACE
        assert -(-k // config.columns) >= config.splits


def test_which_products_fit_the_kernels():
    x, weight = (torch.zeros(n, 32, dtype=torch.bfloat16, device=DEVICE) for n in (64, 8))
    assert linear.fits(x, weight) == (DEVICE.type == "cuda")
    assert not linear.fits(x.repeat(5, 1), weight)
    assert not linear.fits(x[:0], weight)
    assert not linear.fits(x.float(), weight.float())
    assert not linear.fits(x[:, :24], weight[:, :24].contiguous())
    assert not linear.fits(x[:, :16], weight[:, :16])


def test_the_norm_is_fused_for_one_row_and_a_small_weight(monkeypatch):
    monkeypatch.setattr(linear, "fits", lambda *_: True)
    weight = torch.empty(8 << 10, 2048, dtype=torch.bfloat16, device="meta")
    x = torch.empty(2, 2048, dtype=torch.bfloat16, device="meta")
    assert linear.can_norm(x[:1], weight[1:])
    assert not linear.can_norm(x[:1], weight)
    assert not linear.can_norm(x, weight[1:])


def test_which_shapes_cublas_computes():
    assert linear_tiles.is_ours(64, 8, 16)
    assert not linear_tiles.is_ours(65, 8, 16)
    assert linear_tiles.is_ours(128, 28672, 4096)


@pytest.mark.parametrize("rows", [2, 70])
def test_gated_of_both_ops(rows):
    """Both Ops compute a gated product correctly. On a CPU the kernels take no product, so torch computes both results."""
    x, weight = random(rows, 48), weights(20, 48)
    expected = exact(x, weight, None, gated=True)
    assert_near(CudaOps().gated(x, weight), expected, 1e-2)  # gate and up are rounded before SwiGLU
    assert_near(PlainOps().gated(x, weight), expected, 1e-2)


def test_an_mlp():
    mlp = GatedMlp(32, 48, dtype=DTYPE, device=DEVICE)
    for parameter in mlp.parameters():
        parameter.copy_(weights(*parameter.shape))
    hidden, norm = random(3, 32), (random(32), 1e-6)
    gate_up, down = mlp.gate_up_proj.weight, mlp.down_proj.weight
    inner = PlainOps().silu_mul(plain_linear(F.rms_norm(hidden, (32,), *norm), gate_up))
    expected = hidden + plain_linear(inner, down)
    mlp(hidden, norm, PlainOps())
    torch.testing.assert_close(hidden, expected, rtol=0.01, atol=0.01)


@pytest.mark.parametrize("rows", [1, 3, 70])
def test_products_of_the_ops_with_a_norm(rows):
    """CudaOps computes products with a norm as PlainOps does.

    On CUDA, norm and product are one kernel, two kernels, or a kernel and torch's product. On a CPU the product is torch's.
    """
    x, norm, weight, bias = random(rows, 48), (random(48), 1e-6), weights(20, 48), random(20)
    for found, expected in zip(
        (CudaOps().norm_linear(x, norm, weight, bias), CudaOps().gated(x, weight, norm)),
        (PlainOps().norm_linear(x, norm, weight, bias), PlainOps().gated(x, weight, norm)),
        strict=True,
    ):
        assert_near(found, expected.double(), 1e-2)
