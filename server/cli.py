"""Defines the commands of `tidegate`. A command imports its modules when it runs, so `tidegate --help` needs no torch or
FastAPI."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from rich.markup import escape

from engine.errors import EXIT_BAD_SETTINGS, ConfigError, InvalidRequest, TidegateError
from engine.request import SamplingParams
from engine.startup import keep_kernels
from server import __version__
from server.settings import Settings
from server.settings_sources import describe, flag, in_settings_names, load_settings

EXIT_FAILED = 1
EXIT_INTERRUPTED = 130

app = typer.Typer(
    name="tidegate", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich"
)
bench = typer.Typer(no_args_is_help=True, help="Measure how fast this machine is.")
app.add_typer(bench, name="bench")
cache = typer.Typer(no_args_is_help=True, help="Administer the KV cache of a running server.")
app.add_typer(cache, name="cache")

ConfigFile = Annotated[Path | None, typer.Option("--config", metavar="FILE", help="YAML file of settings.")]
Record = Annotated[Path | None, typer.Option(metavar="FILE", help="File to which the lines of JSON are appended as well.")]
# Settings that are flags of the commands that run an engine in their own process.
ENGINE_FLAGS = (
    "model",
    "device",
    "dtype",
    "load_format",
    "max_model_len",
)
ALIASES = {"dtype": ["--precision"]}


def with_settings(names: Iterable[str]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Return a decorator that turns a function whose first argument is a Settings into a command. The command has the option
    --config and a flag for each setting in `names`."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        def run(config: Path | None, **given: Any) -> None:
            flags = {name: value for name in names if (value := given.pop(name)) is not None}
            try:
                command(load_settings(flags, config=config), **given)
            except KeyboardInterrupt:
                raise typer.Exit(EXIT_INTERRUPTED) from None

        _, *own = inspect.signature(command, eval_str=True).parameters.values()
        parameters = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own]
        parameters += [_parameter("config", ConfigFile), *(_parameter(name, _option(name)) for name in names)]
        run.__name__ = command.__name__
        run.__doc__ = command.__doc__
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return run

    return decorate


def _option(name: str) -> Any:
    field, right = Settings.model_fields[name], describe(name)
    is_switch, is_text = right == "true or false", right.startswith("a text")
    kind: Any = bool if is_switch else str  # Settings parses the text, so flags, variables and files give equal errors
    words = [f"{flag(name)}/{flag('no_' + name)}"] if is_switch else [flag(name), *ALIASES.get(name, [])]
    says = field.description if is_switch or is_text else f"{field.description} ({right})"
    value = "none" if field.default == () else str(field.default).lower() if is_switch else field.default
    default = "" if field.default is None else f" [default: {value}]"
    option = typer.Option(
        *words, help=escape(f"{says}.{default}"), show_default=False, metavar=None if is_switch else "TEXT" if is_text else ""
    )
    return Annotated[kind | None, option]


def _parameter(name: str, annotation: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"tidegate {__version__}")
        raise typer.Exit


@app.callback()
def tidegate(
    version: Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print version.")] = False,
) -> None:
    """An inference server for large language models."""


@app.command()
@with_settings(Settings.model_fields)
def serve(settings: Settings) -> None:
    """Serve a model over HTTP and gRPC.

    Every flag can also be set as TIDEGATE_<NAME> in the environment, or in the YAML file of --config.
    """
    raise typer.Exit(_load("server.supervise.supervisor").serve(settings))


@app.command()
@with_settings(Settings.model_fields)
def doctor(settings: Settings) -> None:
    """Report what this machine can run with these settings, and why it cannot run the rest."""
    raise typer.Exit(_load("server.findings").report(_load("server.doctor").examine(settings)))


@app.command()
@with_settings((*ENGINE_FLAGS, "generation_config"))
def generate(
    settings: Settings,
    prompt: Annotated[str, typer.Argument(help="Text to continue; - reads it from standard input.")],
    max_tokens: Annotated[
        int | None, typer.Option(help="Largest number of tokens to generate.", show_default="the model's, or 128")
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option(help="Sampling temperature; 0 takes the most probable token each time.", show_default="the model's, or 1"),
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(
            help="Sample from the most probable tokens that have this probability together.", show_default="the model's, or 1"
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of sampling: the same seed gives the same text.")] = None,
) -> None:
    """Generate text from one prompt in this process, and print it as it is generated.

    The engine's settings are those of `serve`, TIDEGATE_<NAME> and --config included.
    """
    # Typer does not check the values: Settings and SamplingParams refuse wrong ones, in the same words as for `serve`.
    given = {"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p, "seed": seed}
    asked: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    SamplingParams(**asked)
    words = _prompt(prompt)
    config = _with_model(settings).engine_config()
    generation = _load("engine.models.generation")
    defaults = generation.GenerationDefaults()
    if settings.generation_config == "auto":
        defaults = generation.read_generation_defaults(config.model)
    _keep_kernels()
    text = _load("server.text.tokenizer").Tokenizer.from_folder(config.model)
    params = SamplingParams(
        **{"max_tokens": 128, **defaults.params, **asked}, bad_words=defaults.bad_words, end_token_ids=tuple(text.end_tokens)
    )
    ids = text.encode(words)
    detokenizer = text.detokenizer(ids)
    with _load("engine.llm").LLM(**msgspec.structs.asdict(config) | {"offline": True}) as llm:
        for event in llm.stream(ids, params):
            typer.echo(detokenizer.add(event.tokens), nl=False)
    typer.echo(detokenizer.flush())


@app.command("compile")
@with_settings((*ENGINE_FLAGS[:1], "dtype", "block_size", "max_num_seqs", "max_step_tokens"))
def compile_kernels(
    settings: Settings,
    output: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder for the compiled kernels.")],
    gpu: Annotated[
        str | None, typer.Option(metavar="NAME", help="GPU to compile for, by default this machine's. A wrong name lists all.")
    ] = None,
) -> None:
    """Compile every kernel that serving a model can launch on a GPU, ahead of time. Needs Triton, and no GPU.

    `tidegate serve --kernel-folder FOLDER` then starts without compiling anything, with the same model shapes and settings,
    Triton and Tidegate. The folder may be read-only, and may hold kernels for several models, GPUs and settings.
    """
    _keep_kernels()
    _load("server.compile").run(_with_model(settings), output, gpu)


@bench.command()
@with_settings([name for name in ENGINE_FLAGS if name != "model"])
def offline(
    settings: Settings,
    model: Annotated[list[str] | None, typer.Option(metavar="FOLDER", help="Checkpoint; may be given several times.")] = None,
    workload: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Workload; may be given several times. A wrong name lists all.")
    ] = None,
    rounds: Annotated[int, typer.Option(help="Number of runs of each workload; the best one counts.")] = 3,
    record: Record = None,
) -> None:
    """Measure workloads with engines in this process, one engine for each model.

    Without --workload these run: single, decode64, mixed256 and prefill, except those that need a longer context than the model
    has. After each model and workload, a row is written to standard error and a line of JSON to standard output.

    The engine's settings are those of `serve`, TIDEGATE_<NAME> and --config included; the prefix cache is off.
    """
    _keep_kernels()
    named = [settings.model_copy(update={"model": folder}) for folder in model or ()] or [_with_model(settings)]
    _load("server.bench.offline").run(named, workload or (), rounds=rounds, record=record)


@bench.command()
def kernels(
    kernel: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Kernel; may be given several times. A wrong name lists all.")
    ] = None,
    record: Record = None,
) -> None:
    """Measure each kernel at shapes of real models, against the device's bandwidth and peak rate. Needs CUDA."""
    _keep_kernels()
    _load("server.bench.kernels").run(kernel or (), record=record)


@bench.command()
@with_settings((*ENGINE_FLAGS, "max_num_seqs", "max_step_tokens"))
def cost(
    settings: Settings,
    out: Annotated[Path, typer.Option(metavar="FILE", help="File to write, which the setting cost_file then names.")],
    rounds: Annotated[int, typer.Option(help="Number of times that steps of all sizes are measured.")] = 2,
    record: Record = None,
) -> None:
    """Measure how long steps of a model take on this machine, and write them as a cost file.

    Nothing else should use the device meanwhile. The file holds for this device, model and precision. Nothing is written if the
    times are off by more than 25% at the median on steps that they were not fitted to.
    """
    _keep_kernels()
    _load("server.bench.cost").run(_with_model(settings), out=out, rounds=rounds, record=record)


@bench.command()
def plan(
    rate: Annotated[float | None, typer.Option(help="Requests a second to serve.", show_default="the trace's own")] = None,
    costs: Annotated[
        list[Path] | None, typer.Option(metavar="FILE", help="Times of steps on a card; may be given several times, to compare.")
    ] = None,
    shape: Annotated[str, typer.Option(help="Lengths of prompts and outputs: chat, rag or long.")] = "chat",
    trace: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Requests instead of a shape: a trace as `python -m loadtest run` takes it."),
    ] = None,
    ttft_ms: Annotated[float, typer.Option(help="Longest time to first token of a good request.")] = 500.0,
    gap_ms: Annotated[float, typer.Option(help="Longest gap between two tokens of a good request.")] = 50.0,
    share: Annotated[float, typer.Option(help="Share of the requests that must be good.")] = 0.99,
    prefix: Annotated[int, typer.Option(help="Tokens with which all prompts begin.")] = 0,
    cv: Annotated[float, typer.Option(help="Variation of the time between arrivals: 1 is Poisson, more is bursts.")] = 1.0,
    seconds: Annotated[float, typer.Option(help="Simulated seconds of each rate.")] = 60.0,
    kv_tokens: Annotated[
        list[int] | None,
        typer.Option(help="Tokens that the card's KV cache holds; once, or once for each cost file.", show_default="832000"),
    ] = None,
    record: Record = None,
) -> None:
    """Simulate how many replicas a load needs, from the times of steps that `tidegate bench cost` measures.

    For each cost file, the highest rate is searched that one replica keeps: so large a share of the requests is good. The rates
    tried and the answer are written to standard error, and a line of JSON to standard output. Needs no GPU.
    """
    _load("server.bench.plan").run(
        costs or (),
        rate=rate,
        shape=shape,
        trace=trace,
        ttft_ms=ttft_ms,
        gap_ms=gap_ms,
        share=share,
        prefix=prefix,
        cv=cv,
        seconds=seconds,
        kv_tokens=kv_tokens or (),
        record=record,
    )


@cache.command()
def reset(
    admin_url: Annotated[str, typer.Option(metavar="URL", help="The server's admin port.")] = "http://127.0.0.1:9001",
    tier: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Tier to reset; may be given several times.", show_default="all tiers"),
    ] = None,
) -> None:
    """Make all engines of a server forget the KV cache of prompts that were computed before.

    Running requests go on. How many blocks each tier held is printed.
    """
    for name, blocks in _load("server.admin_client").reset_cache(admin_url, tier or ()).items():
        typer.echo(f"{name}: {blocks} block{'' if blocks == 1 else 's'} forgotten")


def _prompt(given: str) -> str:
    """Return the prompt as text, read from standard input if it was given as "-". Raises InvalidRequest if it is not UTF-8."""
    raw = sys.stdin.buffer.read() if given == "-" else os.fsencode(given)
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        where = "standard input" if given == "-" else "the prompt"
        raise InvalidRequest(f"{where} is not UTF-8 text: {error.reason} at byte {error.start}", param="prompt") from None


def _with_model(settings: Settings) -> Settings:
    """Return settings that name a model: the bundled model's folder is filled in if `settings` names none."""
    if settings.model is not None:
        return settings
    bundled = _load("server.bundled")
    typer.echo(bundled.NOTICE, err=True)
    return settings.model_copy(update={"model": str(bundled.bundled_checkpoint())})


def _keep_kernels() -> None:
    try:
        keep_kernels()
    except OSError as error:
        raise ConfigError(f"there is no folder for compiled kernels: {error}; set TRITON_CACHE_DIR to one") from None


def _load(module: str) -> Any:
    return importlib.import_module(module)


def main() -> None:
    try:
        app()
    except TidegateError as error:
        typer.echo(f"tidegate: {in_settings_names(error.message)}", err=True)
        settings_wrong = error.code in ("bad_config", "bad_checkpoint")
        sys.exit(EXIT_BAD_SETTINGS if settings_wrong else EXIT_FAILED)


if __name__ == "__main__":
    main()
