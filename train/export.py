"""Writes a trained model as a checkpoint folder with Hugging Face's names and files.

    python -m train.export plain RUN OUT        bfloat16 weights of a training run
    python -m train.export fp8 PLAIN OUT        the same, with matrices as DeepSeek ships V3: e4m3 in blocks of 128 x 128

The FP8 folder keeps in bfloat16 what V3's own files keep: embedding and head, norms, routers, and MTP's eh_proj.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from safetensors.torch import load_file, save_file
from torch import nn

from engine.models.families import parse_spec
from engine.quant import fp8
from train import state
from train.model import Decoder
from train.shapes import BEGIN, DRAFT, END, TIDEPOOL

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

BLOCK = (128, 128)
QUANTIZATION = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": list(BLOCK)}
QUANTIZED = re.compile(r".*\.(?!eh_)\w+_proj(_with_mqa)?\.weight")
STACKED = re.compile(r"(.*\.experts)\.(\w+_proj)")
KEPT_FLOAT32 = "e_score_correction_bias"  # this tensor stays float32, since its updates are smaller than bfloat16's precision
CONFIGS = {"tidepool": TIDEPOOL, "draft": DRAFT}

Tensors = dict[str, torch.Tensor]


def checkpoint_tensors(model: nn.Module) -> Tensors:
    """Return the float32 state dict of a trained `Decoder`. Stacked experts [E, out, in] are split into E tensors [out, in]."""
    out: Tensors = {}
    for name, tensor in model.state_dict().items():
        if match := STACKED.fullmatch(name):
            out |= {f"{match[1]}.{e}.{match[2]}.weight": part for e, part in enumerate(tensor)}
        else:
            out[name] = tensor
    return out


def to_bfloat16(tensors: Tensors) -> Tensors:
    return {n: (t if n.endswith(KEPT_FLOAT32) else t.bfloat16()).contiguous().clone() for n, t in tensors.items()}


def to_fp8(tensors: Tensors) -> Tensors:
    """Convert matrices to e4m3 and add their float32 scales to the tensors. All other tensors stay as they are."""
    out: Tensors = {}
    for name, tensor in tensors.items():
        if QUANTIZED.fullmatch(name):
            out[name], out[name + fp8.SCALE_SUFFIX] = fp8.quantize(tensor.float(), BLOCK)
        else:
            out[name] = tensor
    return out


def write(folder: Path, tensors: Tensors, config: dict[str, Any], tokenizer: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    weights = folder / "model.safetensors"
    save_file(dict(sorted(tensors.items())), weights, metadata={"format": "pt"})
    weights.chmod(0o644)  # safetensors creates the file readable by its owner only
    generation = {"bos_token_id": BEGIN, "eos_token_id": END}
    for name, content in (("config.json", config), ("generation_config.json", generation)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if (tokenizer / name).resolve() != (folder / name).resolve():
            shutil.copyfile(tokenizer / name, folder / name)


@app.command()
def plain(
    run: Annotated[Path, typer.Argument(help="Folder of the run.")],
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
    model: Annotated[str, typer.Option(help=f"What was trained: {' or '.join(CONFIGS)}.")] = "tidepool",
    tokenizer: Annotated[Path, typer.Option(help="Folder of tokenizer.json.")] = Path(".cache/train/tokenizer"),
) -> None:
    """Write the model of RUN in bfloat16."""
    if model not in CONFIGS:
        raise typer.BadParameter(f"{model!r} is not one of {', '.join(CONFIGS)}", param_hint="--model")
    decoder = Decoder(parse_spec(CONFIGS[model]), dtype=torch.float32)
    state.load_model(run, decoder)
    write(out, to_bfloat16(checkpoint_tensors(decoder)), CONFIGS[model], tokenizer)


@app.command("fp8")
def quantized(
    plain: Annotated[Path, typer.Argument(help="A folder that `plain` wrote.")],
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
) -> None:
    """Write the model of PLAIN with its matrices in FP8."""
    config = json.loads((plain / "config.json").read_text())
    tensors = load_file(plain / "model.safetensors")
    write(out, to_fp8(tensors), config | {"quantization_config": QUANTIZATION}, plain)


if __name__ == "__main__":
    app()
