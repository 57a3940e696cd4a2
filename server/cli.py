"""The `tidegate` command. Each command imports what it runs when it runs: `tidegate --help` needs neither torch nor FastAPI."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from engine.config import Device, DType, LoadFormat
from engine.errors import TidegateError
from engine.request import SamplingParams
from server.settings import Settings, describe, flag, load_settings

EXIT_FAILED = 1
EXIT_BAD_SETTINGS = 2

app = typer.Typer(name="tidegate", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
bench = typer.Typer(no_args_is_help=True, help="Measure how fast this machine is.")
app.add_typer(bench, name="bench")

Model = Annotated[str | None, typer.Option(help="Checkpoint folder; without one, a tiny random demo model.")]
ConfigFile = Annotated[Path | None, typer.Option("--config", metavar="FILE", help="YAML file of settings.")]


def with_settings_flags(command: Callable[[Settings], None]) -> Callable[..., None]:
    """`command` with a flag for every field of Settings, and --config."""

    def run(config: Path | None, **flags: object) -> None:
        command(load_settings({name: value for name, value in flags.items() if value is not None}, config=config))

    parameters = [_parameter("config", ConfigFile)]
    for name, field in Settings.model_fields.items():
        default = "" if field.default is None else f" [default: {field.default}]"
        is_switch = describe(name) == "true or false"
        kind: Any = bool if is_switch else str  # Settings reads the text, so that an error reads alike from wherever it came
        words = [f"{flag(name)}/{flag('no_' + name)}"] if is_switch else [flag(name)]
        option = typer.Option(
            *words, help=f"{field.description}.{default}", show_default=False, metavar=None if is_switch else ""
        )
        parameters.append(_parameter(name, Annotated[kind | None, option]))
    run.__name__ = command.__name__
    run.__doc__ = command.__doc__
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def _parameter(name: str, annotation: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


@app.command()
@with_settings_flags
def serve(settings: Settings) -> None:
    """Serve a model over HTTP and gRPC.

    Every flag can also be set as TIDEGATE_<NAME> in the environment, or in the YAML file of --config.
    """
    raise typer.Exit(_load("server.supervisor").serve(settings))


@app.command()
@with_settings_flags
def doctor(settings: Settings) -> None:
    """Say what this machine can run with these settings, and why not the rest."""
    module = _load("server.doctor")
    raise typer.Exit(module.report(module.examine(settings)))


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="The text to go on from; - reads standard input.")],
    model: Model = None,
    max_tokens: Annotated[int, typer.Option(help="Most tokens to generate.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token every time.")] = 1.0,
    top_p: Annotated[float, typer.Option(help="Share of the probability to choose from.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Same seed, same text.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Generate from one prompt in this process, and print the text as it comes."""
    # What may be said here is said by Settings and SamplingParams, in the words that `serve` uses.
    settings = load_settings({"device": device} | ({"model": model} if model is not None else {}))
    params = SamplingParams(max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed)
    folder = _folder(settings.model)
    text = _load("server.text.tokenizer").Tokenizer.from_folder(folder)
    ids = text.encode(sys.stdin.read() if prompt == "-" else prompt)
    detokenizer = text.detokenizer(ids)
    with _load("engine.llm").LLM(folder, device=settings.device) as llm:
        for event in llm.stream(ids, params):
            typer.echo(detokenizer.add(event.tokens), nl=False)
    typer.echo(detokenizer.flush())


@bench.command()
def offline(
    model: Model = None,
    workload: Annotated[str, typer.Option(help="Its name; a wrong one lists them all.")] = "mixed256",
    load_format: Annotated[LoadFormat, typer.Option(help="dummy: random weights of the right shapes.")] = "safetensors",
    precision: Annotated[DType, typer.Option(help="Number format of weights and activations.")] = "auto",
    device: Annotated[Device, typer.Option(help="Where to run.")] = "auto",
) -> None:
    """Run a workload through an engine in this process; the last line on standard output is JSON."""
    run = _load("server.bench").offline
    run(_folder(model), workload, load_format=load_format, precision=precision, device=device)


def _folder(model: str | None) -> str:
    if model is not None:
        return model
    demo = _load("server.demo")
    typer.echo(demo.NOTICE, err=True)
    return str(demo.ensure_demo_checkpoint())


def _load(module: str) -> Any:
    return importlib.import_module(module)


def main() -> None:
    try:
        app()
    except TidegateError as error:
        typer.echo(f"tidegate: {error.message}", err=True)
        settings_wrong = error.code in ("bad_config", "bad_checkpoint")
        sys.exit(EXIT_BAD_SETTINGS if settings_wrong else EXIT_FAILED)


if __name__ == "__main__":
    main()
