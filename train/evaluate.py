"""Measures the quality of a model: `python -m train.evaluate --model checkpoints/tidepool`, or `--model http://host:port`.

It prints a table on stderr, and one line of JSON as the last line on stdout. Bits per byte are over the UTF-8 bytes of the
held-out texts, so that models with other vocabularies, and xz, can be compared. The engine runs the model; the training code
is not needed.
"""

from __future__ import annotations

import datetime
import hashlib
import lzma
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import msgspec
import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from engine import LLM
from engine.config import EngineConfig, resolve
from engine.errors import ConfigError, TidegateError
from engine.models.families import read_spec
from engine.models.spec import ModelSpec
from train.acceptance import Balance, TeacherForced, choose_prompts, continue_greedily, draft_acceptance
from train.scoring import EngineScorer, Score, Scorer, ServerFailure, ServerScorer, read_documents, score, windows, xz_size

BALANCE_SEQUENCES, BALANCE_TOKENS = 64, 512  # to measure experts: most pieces of text, and most tokens of a piece
EXIT_FAILED = 1


class Report(msgspec.Struct, kw_only=True):
    """The result of an evaluation, written as one JSON line. A figure that cannot be measured for a model is null. `mtp_reason`
    says why the figure for MTP is null."""

    date: str
    model: str
    precision: str | None  # number format of the stored weights
    compute: str | None  # number format in which the model computes
    device: str | None
    bits_per_byte: float
    xz_bits_per_byte: float  # the texts compressed as one stream by `xz -9e`, for comparison
    xz_per_file_bits_per_byte: float
    top1: float  # share of tokens that are the model's argmax
    mtp_acceptance: float | None
    mtp_reason: str | None = None
    draft: str | None = None
    draft_acceptance: float | None
    expert_layers: list[int] | None  # indices of the layers with experts; the MTP module's comes last
    expert_max_over_mean: list[float] | None  # load of the busiest expert divided by the mean load, by layer
    expert_max_over_mean_max: float | None
    expert_utilisation: float | None  # share of experts, over all layers, with at least half the mean load
    heldout_bytes: int
    heldout_files: int
    heldout_sha256: str  # sha256 of the held-out file's uncompressed lines
    tokens: int
    context: int  # largest number of tokens in a window
    seconds: float
    command: str


class Beside(NamedTuple):
    """Holds the figures of an evaluation that need the model's weights, and so are not available from a server."""

    precision: str | None = None
    compute: str | None = None
    device: str | None = None
    mtp_acceptance: float | None = None
    mtp_reason: str | None = None
    draft_acceptance: float | None = None
    balance: Balance | None = None


class Asked(NamedTuple):
    model: str
    heldout: Path
    dtype: str
    context: int | None
    max_bytes: int | None
    draft: str | None
    num_prompts: int

    @property
    def is_url(self) -> bool:
        return self.model.startswith(("http://", "https://"))


def evaluate(asked: Asked, console: Console) -> Report:
    """Evaluate a model on held-out text. Raises TidegateError for wrong arguments, and ServerFailure if a server does not
    answer."""
    began = time.perf_counter()
    documents = read_documents(asked.heldout, asked.max_bytes)
    texts = [document.text for document in documents]
    raw = [text.encode() for text in texts]
    num_bytes = sum(map(len, raw))
    if asked.is_url:
        scorer, files, size, scored, beside = _by_server(asked, texts, console)
    else:
        scorer, files, size, scored, beside = _by_engine(asked, texts, console)
    balance = beside.balance
    return Report(
        date=datetime.date.today().isoformat(),
        model=scorer.name,
        precision=beside.precision,
        compute=beside.compute,
        device=beside.device,
        bits_per_byte=round(scored.bits_per_byte(num_bytes), 5),
        xz_bits_per_byte=round(8 * xz_size(b"".join(raw)) / num_bytes, 5),
        xz_per_file_bits_per_byte=round(8 * sum(map(xz_size, raw)) / num_bytes, 5),
        top1=round(scored.top1, 5),
        mtp_acceptance=_rounded(beside.mtp_acceptance),
        mtp_reason=beside.mtp_reason,
        draft=asked.draft,
        draft_acceptance=_rounded(beside.draft_acceptance),
        expert_layers=None if balance is None else balance.layers,
        expert_max_over_mean=None if balance is None else balance.max_over_mean,
        expert_max_over_mean_max=None if balance is None else max(balance.max_over_mean),
        expert_utilisation=None if balance is None else round(balance.utilisation, 5),
        heldout_bytes=num_bytes,
        heldout_files=len(files),
        heldout_sha256=hashlib.sha256(lzma.decompress(asked.heldout.read_bytes())).hexdigest(),
        tokens=scored.tokens,
        context=size,
        seconds=round(time.perf_counter() - began, 2),
        command=shlex.join(["python", "-m", "train.evaluate", *sys.argv[1:]]),
    )


_Scored = tuple[Scorer, list[list[int]], int, Score, Beside]


def _by_server(asked: Asked, texts: Sequence[str], console: Console) -> _Scored:
    if asked.draft is not None:
        raise ConfigError("draft goes with a model in a folder: a server does not say what it would have guessed", param="draft")
    if asked.dtype != "auto":
        raise ConfigError("dtype goes with a model in a folder: a server computes in what it was started with", param="dtype")
    scorer = ServerScorer(asked.model)
    files, size, scored = _score(scorer, texts, asked.context, console)
    return scorer, files, size, scored, Beside(mtp_reason="the model is a server's: its MTP module cannot be asked from here")


def _by_engine(asked: Asked, texts: Sequence[str], console: Console) -> _Scored:
    with _llm(asked.model, asked.dtype) as llm:
        scorer = EngineScorer(llm)
        files, size, scored = _score(scorer, texts, asked.context, console)
        with console.status("guesses and experts"):
            beside = _beside(asked, llm, files)
    return scorer, files, size, scored, beside


def _llm(folder: str, dtype: str) -> LLM:
    # No prompt occurs twice, and prompt log-probabilities need every position computed, so a prefix cache is of no use.
    return LLM(folder, dtype=dtype, cache={"prefix_caching": False})


def _score(scorer: Scorer, texts: Sequence[str], context: int | None, console: Console) -> tuple[list[list[int]], int, Score]:
    """Score the held-out texts. Returns the token ids of each text, the window size, and the Score over all texts."""
    size = scorer.max_window if context is None else min(context, scorer.max_window)
    files = [scorer.encode(text) for text in texts]
    total = sum(span.end - span.start for ids in files for span in windows(len(ids), size))
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(f"{scorer.name}: {total:,} tokens", total=total)
        return files, size, score(scorer, files, size, lambda n: bar.advance(task, n))


def _beside(asked: Asked, llm: LLM, files: Sequence[list[int]]) -> Beside:
    spec = read_spec(asked.model)
    config = msgspec.convert({"model": asked.model, "dtype": asked.dtype}, EngineConfig)
    config = resolve(config, spec.limits(), has_cuda=torch.cuda.is_available())
    own = TeacherForced(Path(asked.model), dtype=getattr(torch, config.dtype), device=torch.device(config.device))
    continued = continue_greedily(llm, choose_prompts(files, asked.num_prompts))
    beside = Beside(
        precision="fp8" if spec.fp8 is not None else spec.dtype,
        compute=config.dtype,
        device=llm.info.device,
        mtp_acceptance=own.mtp_acceptance(continued),
        mtp_reason=_why_no_mtp(spec, own),
        balance=own.expert_balance(_spread(files)),
    )
    if asked.draft is None:
        return beside
    _check_draft(read_spec(asked.draft), spec, asked)
    with _llm(asked.draft, asked.dtype) as draft:
        return beside._replace(draft_acceptance=draft_acceptance(draft, continued))


def _why_no_mtp(spec: ModelSpec, own: TeacherForced) -> str | None:
    if own.mtp is not None:
        return None
    if not spec.num_mtp_layers:
        return f"config.json of this {spec.architecture} names no MTP layer"
    return "the checkpoint has no tensor of the MTP layer that its config.json names"


def _check_draft(draft: ModelSpec, target: ModelSpec, asked: Asked) -> None:
    if draft.vocab_size != target.vocab_size:
        raise ConfigError(
            f"draft {asked.draft} has {draft.vocab_size} tokens and {asked.model} has {target.vocab_size}: "
            "a draft must have the model's own vocabulary",
            param="draft",
        )


def _spread(files: Sequence[list[int]]) -> list[list[int]]:
    """Take at most BALANCE_SEQUENCES pieces, spread evenly over all files. The beginnings of files alone would be imports, which
    few experts handle."""
    pieces = [ids[at : at + BALANCE_TOKENS] for ids in files for at in range(0, len(ids), BALANCE_TOKENS)]
    pieces = [piece for piece in pieces if len(piece) > 1]
    num = min(BALANCE_SEQUENCES, len(pieces))
    return [pieces[i * len(pieces) // num] for i in range(num)]


def _rounded(share: float | None) -> float | None:
    return None if share is None else round(share, 5)


def table_of(report: Report) -> Table:
    held = f"{report.heldout_bytes:,} bytes, {report.tokens:,} tokens in {report.heldout_files:,} files"
    table = Table(title=f"{report.model}, {report.precision or 'precision unknown'}: {held}", show_header=False)
    rows: dict[str, Any] = {
        "bits per byte": f"{report.bits_per_byte:.4f}",
        "xz -9e, one stream": f"{report.xz_bits_per_byte:.4f}",
        "xz -9e, file by file": f"{report.xz_per_file_bits_per_byte:.4f}",
        "argmax token right": f"{report.top1:.1%}",
        "MTP acceptance": report.mtp_reason if report.mtp_acceptance is None else f"{report.mtp_acceptance:.1%}",
        "draft acceptance": None if report.draft_acceptance is None else f"{report.draft_acceptance:.1%}",
        "busiest expert / mean": report.expert_max_over_mean_max and f"{report.expert_max_over_mean_max:.2f} at most",
        "experts in use": None if report.expert_utilisation is None else f"{report.expert_utilisation:.1%}",
        "computed in": report.compute and f"{report.compute} on {report.device}",
        "seconds": f"{report.seconds:.1f}",
    }
    for name, value in rows.items():
        if value is not None:
            table.add_row(name, value)
    return table


def main(
    model: Annotated[str, typer.Option(help="Checkpoint folder, or the address of a server.")],
    heldout: Annotated[Path, typer.Option(help="Xz-compressed JSON lines with path and text.")] = Path("train/heldout.jsonl.xz"),
    dtype: Annotated[str, typer.Option(help="Compute in it: auto, float32, bfloat16 or float16.")] = "auto",
    context: Annotated[
        int | None, typer.Option(min=2, help="Tokens in a window at most; by default what the model takes.")
    ] = None,
    max_bytes: Annotated[int | None, typer.Option(min=1, help="Score only so many bytes of text, the first.")] = None,
    draft: Annotated[str | None, typer.Option(help="Checkpoint folder of a draft model, to measure its guesses.")] = None,
    prompts: Annotated[int, typer.Option(min=1, help="Continuations to measure guesses on, of a folder's model.")] = 32,
    record: Annotated[Path | None, typer.Option(help="File to append the JSON line to as well.")] = None,
) -> None:
    """Measure a model on held-out text; the last line on standard output is JSON.

    `auto` computes in float32 on a CPU, since few CPUs multiply bfloat16 fast, and in the checkpoint's type on a GPU.
    """
    console = Console(stderr=True)
    if record is not None:
        record.parent.mkdir(parents=True, exist_ok=True)
    try:
        report = evaluate(Asked(model, heldout, dtype, context, max_bytes, draft, prompts), console)
    except (TidegateError, ServerFailure) as error:
        typer.echo(f"evaluate: {error}", err=True)
        raise typer.Exit(EXIT_FAILED) from None
    console.print(table_of(report))
    line = msgspec.json.encode(report).decode() + "\n"
    sys.stdout.write(line)
    if record is not None:
        with record.open("a") as file:
            file.write(line)


if __name__ == "__main__":
    typer.run(main)
