"""What a start does with Triton's cache and with a folder of kernels that are damaged or cannot be written."""

import errno
import logging

import msgspec
import pytest

from engine.config import EngineConfig, resolve
from engine.device import kernel_set
from engine.errors import ConfigError
from engine.kernels import kernel_folder
from engine.kernels.hardware import GPUS
from engine.kernels.kernel_folder import KernelSet
from engine.models.families import parse_spec

H200 = GPUS["h200"]
SIZES = {
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "max_position_embeddings": 2048,
}
SPEC = parse_spec(SIZES)
CONFIG = resolve(EngineConfig(model="x", device="cuda"), SPEC.limits(), has_cuda=True)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Triton's cache, and a compiler whose set has no files. Returns the cache's folder, and the list of compilations."""
    folder, built = tmp_path / "cache", []
    folder.mkdir()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(folder))  # an assignment to the knob would set the variable for good

    def build(spec, config, gpu, progress=None):
        built.append(spec)
        return KernelSet(kernel_set.purpose_of(spec, config, gpu), {"KEY": {}})

    monkeypatch.setattr(kernel_set, "build", build)
    return folder, built


def test_a_second_start_compiles_nothing(cache):
    _, built = cache
    for _ in range(2):
        kernel_set.make_ready(SPEC, CONFIG, H200)
    assert len(built) == 1


@pytest.mark.parametrize("content", ["[", "{}", "\x00", ""])
def test_a_damaged_set_in_the_cache_is_reported_and_made_again(cache, content, caplog):
    folder, built = cache
    kernel_set.make_ready(SPEC, CONFIG, H200)
    (file,) = folder.glob("*.json")
    good = file.read_bytes()
    file.write_text(content)
    with caplog.at_level(logging.WARNING, logger="tidegate.engine"):
        kernel_set.make_ready(SPEC, CONFIG, H200)
    assert f"{file} cannot be read" in caplog.text
    assert len(built) == 2
    assert file.read_bytes() == good


@pytest.mark.parametrize("code", [errno.EROFS, errno.ENOSPC, errno.EACCES])
@pytest.mark.parametrize("given", [False, True])
def test_a_cache_that_cannot_be_written_is_named(cache, tmp_path, monkeypatch, code, given):
    folder, _ = cache
    config = CONFIG
    if given:
        config = msgspec.structs.replace(CONFIG, kernel_folder=str(tmp_path))
        kernel_folder.write(KernelSet(kernel_set.purpose_of(SPEC, CONFIG, H200), {"KEY": {}}), tmp_path)

    def fail(*_):
        raise OSError(code, "it failed", "a file")

    monkeypatch.setattr(kernel_folder, "install" if given else "write", fail)
    with pytest.raises(ConfigError, match=rf"cannot be written to {folder}: .*it failed.*; set TRITON_CACHE_DIR"):
        kernel_set.make_ready(SPEC, config, H200)


def test_a_folder_that_cannot_be_written_is_found_before_anything_is_compiled(cache, tmp_path):
    _, built = cache
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        kernel_set.export(SPEC, CONFIG, H200, tmp_path / "file")
    assert built == []


def test_a_model_with_a_longer_context_has_a_set_of_its_own():
    """Llama 3 and 3.1 have the same shapes, and only the longer contexts of 3.1 launch the kernel that merges parts."""
    longer = parse_spec(SIZES | {"max_position_embeddings": 131072})
    assert kernel_set.purpose_of(SPEC, CONFIG, H200) != kernel_set.purpose_of(longer, CONFIG, H200)
