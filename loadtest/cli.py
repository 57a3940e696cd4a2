"""Defines the command line of the load test."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from loadtest.compare import compare_targets
from loadtest.flags import Flags, loads_of, slos_of
from loadtest.line import About
from loadtest.measure import Measurement
from loadtest.run import Output, run_loads
from loadtest.spec import ROUTES, LoadError, Target

EXIT_FAILED, EXIT_BAD_INPUT, EXIT_INTERRUPTED = 1, 2, 130
_PLAIN_WIDTH = 120  # columns of tables that do not go to a terminal

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help="Load test of inference servers."
)

_Key = Annotated[str | None, typer.Option(envvar="LOADTEST_API_KEY", show_envvar=True, help="Key of the endpoint")]
_Route = Annotated[str, typer.Option(help=f"How to ask: {', '.join(ROUTES)}")]
_Model = Annotated[str | None, typer.Option(help="Model to ask for. Default: the first that the endpoint lists")]
_Vocab = Annotated[
    int | None, typer.Option(min=11, help="Token ids of prompts are below this. Default: 10,000, or what Tidegate has")
]
_Text = Annotated[bool, typer.Option("--text", help="Send prompts as text on routes that take token ids too")]
_Procs = Annotated[int, typer.Option(min=1, max=256, help="Processes that send the load, each on one core")]
_Record = Annotated[Path | None, typer.Option(metavar="FILE", help="File to which the JSON lines are appended as well")]
_Raw = Annotated[Path | None, typer.Option(metavar="FILE", help="File to which a JSON line for each request is appended")]


@dataclasses.dataclass(frozen=True)
class AboutFlags:
    """What the user says about the machine that serves."""

    device: Annotated[str | None, typer.Option(help="Device of the server, for the result lines")] = None
    engine: Annotated[str | None, typer.Option(help="Name of the server's engine, for the result lines")] = None
    precision: Annotated[str | None, typer.Option(help="Number format of the model, for the result lines")] = None
    gpus: Annotated[int, typer.Option(min=1, help="GPUs of the server, for tokens/s of a GPU")] = 1
    tag: Annotated[str | None, typer.Option(help="Any text, for the result lines")] = None


def with_flags(command: Callable[..., None]) -> Callable[..., None]:
    """Return a command that also has the options of Flags and AboutFlags, which it gets as its first two arguments."""
    groups = (Flags, AboutFlags)

    def run(**given: Any) -> None:
        made = [group(**{field.name: given.pop(field.name) for field in dataclasses.fields(group)}) for group in groups]
        try:
            command(*made, **given)
        except LoadError as error:
            Console(stderr=True).print(f"[red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
            raise typer.Exit(EXIT_BAD_INPUT) from None
        except KeyboardInterrupt:  # between two measurements: their results are written already
            raise typer.Exit(EXIT_INTERRUPTED) from None

    own = [p.replace(kind=p.KEYWORD_ONLY) for p in list(inspect.signature(command, eval_str=True).parameters.values())[2:]]
    for group in groups:
        hints = inspect.get_annotations(group, eval_str=True)
        own += [
            inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=hints[field.name])
            for field in dataclasses.fields(group)
        ]
    run.__signature__ = inspect.Signature(own)  # type: ignore[attr-defined]  # typer reads it
    run.__doc__, run.__name__ = command.__doc__, command.__name__
    return run


@app.command()
@with_flags
def run(
    flags: Flags,
    about: AboutFlags,
    url: Annotated[str, typer.Argument(help="http://HOST:PORT; for gRPC HOST:PORT")],
    route: _Route = "generate",
    model: _Model = None,
    api_key: _Key = None,
    vocab: _Vocab = None,
    text: _Text = False,
    procs: _Procs = 1,
    metrics: Annotated[str | None, typer.Option(metavar="URL", help="Tidegate's metrics. Default: /metrics of the URL")] = None,
    record: _Record = None,
    raw: _Raw = None,
    page: Annotated[Path | None, typer.Option(metavar="FILE", help="Page of plots to write, .html or .png")] = None,
) -> None:
    """Send a load to a server and report latencies, goodput and errors."""
    loads, slos = loads_of(flags), slos_of(flags)
    target = _target(url, route, model, api_key, vocab, text)
    console = _console()
    said = _about(flags, about)
    done = run_loads(loads, target, slos, said, Output(record, page, raw), procs=procs, metrics=metrics, console=console)
    _leave(done)


@app.command()
@with_flags
def compare(
    flags: Flags,
    about: AboutFlags,
    a: Annotated[str, typer.Argument(help="URL of the first endpoint")],
    b: Annotated[str, typer.Argument(help="URL of the second endpoint")],
    rounds: Annotated[int, typer.Option(min=1, help="How often each endpoint is measured")] = 3,
    route: _Route = "completions",
    route_b: Annotated[str | None, typer.Option(help="Route of the second endpoint, if it is another one")] = None,
    model: _Model = None,
    model_b: Annotated[str | None, typer.Option(help="Model of the second endpoint, if it has another name")] = None,
    api_key: _Key = None,
    api_key_b: Annotated[str | None, typer.Option(envvar="LOADTEST_API_KEY_B", help="Key of the second endpoint")] = None,
    vocab: _Vocab = None,
    text: _Text = False,
    procs: _Procs = 1,
    record: _Record = None,
    raw: _Raw = None,
) -> None:
    """Measure two endpoints in turns with the same loads, and report the ratios of their figures."""
    loads, slos = loads_of(flags), slos_of(flags)
    if len(loads) != 1:
        raise LoadError("compare takes one load: give a single --rate or --concurrency")
    first = _target(a, route, model, api_key, vocab, text)
    second = _target(b, route_b or route, model_b, api_key_b or api_key, vocab, text)
    said, output = _about(flags, about), Output(record, None, raw)
    done = compare_targets(loads[0], (first, second), slos, said, output, rounds=rounds, procs=procs, console=_console())
    _leave([measurement for pair in done for measurement in pair], whole=len(done) == rounds)


def _target(url: str, route: str, model: str | None, api_key: str | None, vocab: int | None, text: bool) -> Target:
    if route not in ROUTES:
        raise LoadError(f"--route is {route!r}: it must be one of {', '.join(ROUTES)}")
    return Target(url, route, model=model or "", api_key=api_key, vocab=vocab or 0, as_text=text)


def _about(flags: Flags, about: AboutFlags) -> About:
    shape = None if flags.prompt or flags.output or flags.lengths else flags.shape or "chat"
    return About(about.device, about.engine, about.precision, about.gpus, shape, about.tag)


def _console() -> Console:
    """Return the console of tables and progress. Standard output has the JSON lines alone."""
    console = Console(stderr=True)
    return console if console.is_terminal else Console(stderr=True, width=_PLAIN_WIDTH)


def _leave(done: list[Measurement], *, whole: bool = True) -> None:
    """Exit with a code that says how the load went: 130 if interrupted, 1 if no request of a measurement was answered."""
    if any(measurement.interrupted for measurement in done) or not whole:
        raise typer.Exit(EXIT_INTERRUPTED)
    if any(m.problem or not any(record.outcome == "ok" for record in m.records) for m in done):
        raise typer.Exit(EXIT_FAILED)
