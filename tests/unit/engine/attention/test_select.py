"""Which attention implementation is chosen for a model's pools, on a CPU and on GPU."""

import pytest
import torch

from engine.attention import select
from engine.attention.torch_gqa import TorchGqa
from engine.attention.torch_mla import TorchMla
from engine.attention.triton_gqa import TritonGqa
from engine.attention.triton_mla import TritonMla
from engine.batch import PoolSpec
from engine.errors import ConfigError, InternalError
from engine.kernels.hardware import GPUS, planned_for


def gqa(head: int = 128, dtype: torch.dtype = torch.bfloat16) -> list[PoolSpec]:
    return [PoolSpec(name=name, shape=(2, head), dtype=dtype) for name in ("k", "v")]


def mla(rank: int = 512, rope: int = 64) -> list[PoolSpec]:
    return [PoolSpec(name="latent", shape=(rank + rope,), dtype=torch.bfloat16, parts=(rank, rope))]


@pytest.fixture(autouse=True)
def _a_gpu():
    with planned_for(GPUS["h200"]):
        yield


GPU = torch.device("meta")  # stands for the GPU


@pytest.mark.parametrize(("pools", "plain", "fast"), [(gqa(), TorchGqa, TritonGqa), (mla(), TorchMla, TritonMla)])
def test_the_pools_decide_the_kind_and_the_device_the_implementation(pools, plain, fast):
    assert type(select.plain(pools)) is plain
    assert type(select.choose(torch.device("cpu"), pools, 16)) is plain
    assert type(select.choose(GPU, pools, 64)) is fast


def test_captured_mixed_steps_are_smaller_with_latents():
    assert select.choose(GPU, gqa(), 64).graph_tokens == 2048
    assert select.choose(GPU, mla(), 64).graph_tokens == 1024
    for pools in (gqa(), mla()):
        assert (select.plain(pools).graphable, select.plain(pools).graph_tokens) == (False, 0)


@pytest.mark.parametrize("names", [("k",), ("latent", "k", "v"), ("keys", "values"), ()])
def test_pools_of_no_known_kind_are_refused_by_name(names):
    pools = [PoolSpec(name=name, shape=(2, 128), dtype=torch.bfloat16) for name in names]
    with pytest.raises(InternalError, match=rf"pools {sorted(names)}".replace("[", r"\[").replace("]", r"\]")):
        select.plain(pools)


@pytest.mark.parametrize("block_size", [8, 48])
def test_a_block_size_without_a_kernel_is_refused_on_cuda(block_size):
    with pytest.raises(ConfigError, match=f"cache.block_size is {block_size}"):
        select.choose(GPU, gqa(), block_size)


@pytest.mark.parametrize(("pools", "plain"), [(gqa(head=96), TorchGqa), (mla(rank=384), TorchMla)])
def test_vectors_without_a_kernel_fall_to_plain_torch_with_a_warning(pools, plain, caplog):
    assert type(select.choose(GPU, pools, 64)) is plain
    assert "no attention kernel for heads or latents of" in caplog.text


@pytest.mark.parametrize(
    ("head", "dtype", "has"),
    [
        (128, torch.bfloat16, True),
        (256, torch.bfloat16, True),
        (512, torch.bfloat16, False),
        (128, torch.float32, True),
        (256, torch.float32, False),
        (96, torch.bfloat16, False),
        (8, torch.float32, False),
    ],
)
def test_heads_that_have_a_kernel(head, dtype, has):
    assert all(select._has_kernel(pool) == has for pool in gqa(head, dtype))


@pytest.mark.parametrize(("rank", "rope", "has"), [(512, 64, True), (384, 64, False), (512, 8, False)])
def test_latents_need_both_parts_to_have_a_kernel(rank, rope, has):
    assert select._has_kernel(mla(rank, rope)[0]) == has
