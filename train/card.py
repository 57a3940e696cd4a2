"""Writes the model cards of Tidepool and of its draft model: `python -m train.card` fills the templates in `cards/`.

Every figure of a training run or a measurement is read from a recorded file; none is typed in.
"""

from __future__ import annotations

import json
import shutil
import statistics
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import matplotlib.figure
import typer

from train.loop import FACTS, LOG

EVALUATION, TRAINING, CURVE = "evaluation.jsonl", "training.jsonl", "curve.png"
Line = dict[str, Any]

TEMPLATES = Path(__file__).with_name("cards")


def read_lines(path: Path) -> list[Line]:
    if not path.exists():
        raise SystemExit(f"{path}: no such file; see `python -m train --help` for the stage that writes it")
    return [json.loads(line) for line in path.read_text().splitlines()]


def draw_curve(log: list[Line], file: Path) -> None:
    """Plot the losses of next-token and MTP prediction over the trained tokens, and below them the bits per byte on held-out
    text."""
    figure = matplotlib.figure.Figure(figsize=(8, 5), layout="constrained")
    above, below = figure.subplots(2, sharex=True, height_ratios=(2, 1))
    for key, label in (("second_loss", "the token after the next (MTP)"), ("loss", "the next token")):
        above.plot([line["tokens"] / 1e6 for line in log], [line[key] for line in log], label=label, linewidth=1)
    above.set(ylabel="loss, nats a token", ylim=(0.8, 3.5))
    above.legend()
    measured = [line for line in log if "heldout_bits_per_byte" in line]
    x, y = [line["tokens"] / 1e6 for line in measured], [line["heldout_bits_per_byte"] for line in measured]
    below.plot(x, y, ".-", color="black", linewidth=1)
    below.set(xlabel="million tokens", ylabel="held out,\nbits per byte", ylim=(0, None))
    for axes in (above, below):
        axes.grid(alpha=0.3)
    figure.savefig(file, dpi=100)


def rate(log: list[Line], length: int) -> str:
    """Say the median tokens/s of the log lines with windows of `length`, and the median model FLOP utilisation if the log has
    it."""
    lines = [line for line in log if line["length"] == length]
    said = f"{statistics.median(line['tok_s'] for line in lines) / 1e6:.2f} million tokens/s"
    used = [line["mfu"] for line in lines if "mfu" in line]
    return f"{said} and a model FLOP utilisation of {statistics.median(used):.1%}" if used else said


def latest(lines: list[Line]) -> dict[str, Line]:
    """Return the last evaluation line of each precision, by precision ("fp8", "bfloat16")."""
    return {line["precision"]: line for line in lines}


def evaluation_table(lines: Iterable[Line]) -> str:
    rows = ["| weights | bits per byte | next token right | MTP's second token right |", "|---|---|---|---|"]
    rows += [f"| {e['precision']} | {e['bits_per_byte']:.4f} | {e['top1']:.1%} | {e['mtp_acceptance']:.1%} |" for e in lines]
    return "\n".join(rows)


def licences(manifest: Line) -> str:
    """List how many megabytes of text have which licence, largest first. Licences with less than one megabyte are added up."""
    size: dict[str, int] = defaultdict(int)
    for source in manifest["sources"].values():
        size[source["licence"]] += source["kept_bytes"]
    large = sorted(((total, name) for name, total in size.items() if total >= 1e6), reverse=True)
    rest = sum(total for total in size.values() if total < 1e6) / 1e6
    return ", ".join(f"{total / 1e6:.0f} MB {name}" for total, name in large) + f", and {rest:.1f} MB under other permissive ones"


def folder_size(folder: Path) -> float:
    """Return the size of all files in a folder, in million bytes."""
    return sum(file.stat().st_size for file in folder.iterdir()) / 1e6


def tidepool_card(work: Path, folder: Path) -> str:
    log, run = read_lines(folder / TRAINING), json.loads((work / "tidepool" / FACTS).read_text())
    evaluation, config = latest(read_lines(folder / EVALUATION)), json.loads((folder / "config.json").read_text())
    facts = json.loads((work / "tokens.json").read_text())
    manifest = json.loads((work / "corpus" / "manifest.json").read_text())
    shipped = evaluation["fp8"]
    short, long = int(log[0]["length"]), int(log[-1]["length"])
    return (
        (TEMPLATES / "tidepool.md")
        .read_text()
        .format(
            parameters=run["parameters"] / 1e6,
            size=folder_size(folder),
            chosen=config["num_experts_per_tok"],
            experts=config["n_routed_experts"],
            groups=config["n_group"],
            context=config["max_position_embeddings"],
            vocab=config["vocab_size"],
            documents=facts["documents"],
            tokens=facts["tokens"] / 1e6,
            licences=licences(manifest),
            left_out=manifest["dropped"].get("over_budget", 0),
            nearest=manifest["nearest"],
            heldout_files=manifest["heldout"]["files"],
            heldout_bytes=manifest["heldout"]["bytes"],
            heldout_code=manifest["heldout"]["code_bytes"] / manifest["heldout"]["bytes"],
            heldout_sha256=manifest["heldout"]["sha256_uncompressed"],
            steps=run["plan"]["steps"],
            per_step=run["plan"]["tokens_per_step"],
            total=log[-1]["tokens"] / 1e6,
            epochs=log[-1]["tokens"] / facts["tokens"],
            minutes=run["seconds"] / 60,
            gpus=f"{run['devices']} {run['device']}",
            short=short,
            short_rate=rate(log, short),
            long=long,
            long_rate=rate(log, long),
            table=evaluation_table(evaluation.values()),
            xz=shipped["xz_bits_per_byte"],
            xz_ratio=shipped["xz_bits_per_byte"] / shipped["bits_per_byte"],
            xz_per_file=shipped["xz_per_file_bits_per_byte"],
            balance=shipped["expert_max_over_mean_max"],
            utilisation=shipped["expert_utilisation"],
        )
    )


def draft_card(work: Path, folder: Path, acceptance: float) -> str:
    run = json.loads((work / "tidepool-draft" / FACTS).read_text())
    return (
        (TEMPLATES / "tidepool-draft.md")
        .read_text()
        .format(
            parameters=run["parameters"] / 1e6,
            size=folder_size(folder),
            acceptance=acceptance,
            steps=run["plan"]["steps"],
            per_step=run["plan"]["tokens_per_step"],
            minutes=run["seconds"] / 60,
            gpus=f"{run['devices']} {run['device']}",
        )
    )


def main(
    work: Annotated[Path, typer.Option(help="Folder of the runs and the corpus.")] = Path(".cache/train"),
    checkpoints: Annotated[Path, typer.Option(help="Folder of both models.")] = Path("checkpoints"),
) -> None:
    """Write README.md, the training log and its plot beside both models."""
    tidepool, draft = checkpoints / "tidepool", checkpoints / "tidepool-draft"
    for folder in (tidepool, draft):
        shutil.copyfile(work / folder.name / LOG, folder / TRAINING)
    draw_curve(read_lines(tidepool / TRAINING), tidepool / CURVE)
    (tidepool / "README.md").write_text(tidepool_card(work, tidepool))
    acceptance = latest(read_lines(tidepool / EVALUATION))["fp8"]["draft_acceptance"]
    (draft / "README.md").write_text(draft_card(work, draft, acceptance))


if __name__ == "__main__":
    typer.run(main)
