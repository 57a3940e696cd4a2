"""Trains Tidepool and its draft model from scratch: `python -m train` runs one stage after the other.

An interrupted stage continues where it stopped. `--first` and `--last` select a range of stages.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import torch
import typer

Command = list[str]

CHECKPOINTS = Path("checkpoints")
EVALUATION = CHECKPOINTS / "tidepool" / "evaluation.jsonl"


def stages(work: Path) -> dict[str, list[Command]]:
    """Return the arguments of `python -m` for each stage."""
    work_option = ["--work", str(work)]
    run, draft = work / "tidepool", work / "tidepool-draft"
    shipped, shipped_draft = CHECKPOINTS / "tidepool", CHECKPOINTS / "tidepool-draft"
    plain, plain_draft = work / "tidepool-bf16", work / "tidepool-draft-bf16"
    tokenizer = ["--tokenizer", str(work / "tokenizer")]
    return {
        "fetch": [["train.fetch", *work_option]],
        "corpus": [["train.corpus", *work_option]],
        "tokenizer": [["train.tokenizer", *work_option]],
        "tokens": [["train.tokens", *work_option]],
        "pretrain": [[*_on_all_gpus(), "train.pretrain", *work_option, "--run", str(run)]],
        "distill": [[*_on_all_gpus(), "train.distill", *work_option, "--run", str(draft), "--teacher", str(run)]],
        "export": [
            ["train.export", "plain", str(run), str(plain), *tokenizer],
            ["train.export", "plain", str(draft), str(plain_draft), "--model", "draft", *tokenizer],
            ["train.export", "fp8", str(plain), str(shipped)],
            ["train.export", "fp8", str(plain_draft), str(shipped_draft)],
        ],
        "evaluate": [
            ["train.evaluate", "--model", str(plain), "--record", str(EVALUATION)],
            ["train.evaluate", "--model", str(shipped), "--draft", str(shipped_draft), "--record", str(EVALUATION)],
        ],
        "card": [["train.card", *work_option]],
    }


def _on_all_gpus() -> Command:
    num = torch.cuda.device_count()
    return ["torch.distributed.run", "--standalone", f"--nproc-per-node={num}", "-m"] if num > 1 else []


def main(
    work: Annotated[Path, typer.Option(help="Folder for everything but the checkpoints.")] = Path(".cache/train"),
    first: Annotated[str, typer.Option(help="Stage to begin with.")] = "fetch",
    last: Annotated[str, typer.Option(help="Stage to end with.")] = "card",
) -> None:
    """Run the stages: fetch, corpus, tokenizer, tokens, pretrain, distill, export, evaluate, card."""
    plan = stages(work)
    names = list(plan)
    for option, name in (("--first", first), ("--last", last)):
        if name not in plan:
            raise typer.BadParameter(f"{name!r} is no stage; there are: {', '.join(names)}", param_hint=option)
    for name in names[names.index(first) : names.index(last) + 1]:
        started = time.perf_counter()
        for command in plan[name]:
            done = subprocess.run([sys.executable, "-m", *command], check=False)
            if done.returncode:
                raise typer.Exit(done.returncode)
        typer.echo(f"== {name}: {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    typer.run(main)
