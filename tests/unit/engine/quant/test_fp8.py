"""The engine's block quantisation equals its slow twin, and loses at most half a step of FP8."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.quant.fp8 import dequantize, quantize, scale_shape
from tests.model import fp8_checkpoint as twin

BLOCK = twin.BLOCK
SHAPES = [(128, 128), (256, 384), (1, 1), (127, 129), (300, 40), (5, 260)]


def weight_of(shape, *, seed=0, std=0.1):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * std
    weight[::3] *= 30.0  # larger rows, so that blocks have different scales
    return weight


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantisation_equals_its_slow_twin_bit_by_bit(shape, dtype):
    weight = weight_of(shape).to(dtype)
    found, scale = quantize(weight, BLOCK)
    wanted, wanted_scale = twin.quantize(weight.float())
    assert found.dtype == torch.float8_e4m3fn
    assert scale.dtype == torch.float32
    assert torch.equal(scale, wanted_scale)
    assert torch.equal(found.view(torch.uint8), wanted.view(torch.uint8))


@given(
    rows=st.integers(1, 20),
    columns=st.integers(1, 20),
    block=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    exponent=st.integers(-30, 30),
    seed=st.integers(0, 1000),
)
def test_quantising_and_dequantising_is_exact_to_half_a_step(rows, columns, block, exponent, seed):
    weight = weight_of((rows, columns), seed=seed, std=2.0**exponent)
    stored, scale = quantize(weight, block)
    assert stored.is_contiguous()
    assert scale.shape == scale_shape((rows, columns), block)
    back = dequantize(stored, scale, block)
    by_number = scale.repeat_interleave(block[0], 0)[:rows].repeat_interleave(block[1], 1)[:, :columns]
    # E4M3 has three bits of mantissa, and steps of 2^-9 below 2^-6. The factor 1e-6 is for rounding in float32.
    bound = torch.maximum(weight.abs() / 16, by_number * 2.0**-10) * (1 + 1e-6)
    assert bool(((back - weight).abs() <= bound).all())


def test_the_largest_number_of_a_block_becomes_the_largest_of_fp8():
    stored, scale = quantize(weight_of((64, 64)), (32, 32))
    largest = stored.float().abs().view(2, 32, 2, 32).amax((1, 3))
    assert torch.equal(largest, torch.full((2, 2), 448.0))
    assert bool((scale > 0).all())


def test_a_block_of_zeros_stays_zero_and_has_scale_1():
    weight = weight_of((256, 256))
    weight[128:, :128] = 0.0
    stored, scale = quantize(weight, BLOCK)
    assert scale[1, 0] == 1.0
    assert not stored[128:, :128].float().any()
    assert torch.equal(dequantize(stored, scale, BLOCK)[128:, :128], torch.zeros(128, 128))


@pytest.mark.parametrize("size", [1e-45, 4e-44, 1e-43, 7e-43, 1e-38])
def test_numbers_near_the_smallest_float32_give_no_nan(size):
    stored, scale = quantize(torch.full((4, 4), size), (4, 4))
    assert bool(stored.float().isfinite().all())
    assert bool((scale > 0).all())


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_weights_that_are_not_finite_are_refused(bad):
    weight = torch.ones(4, 4)
    weight[2, 1] = bad
    with pytest.raises(ValueError, match="NaN or infinity"):
        quantize(weight, (2, 2))
