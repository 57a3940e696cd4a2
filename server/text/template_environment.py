"""The Jinja environment of chat templates: the tags, filters, functions and white space rules that transformers gives them.

A template comes from the model folder, which the operator chose. It still runs in Jinja's sandbox, and the work of one rendering
is bounded.
"""

from __future__ import annotations

import datetime
import json
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

TEMPLATE_FILE = "<template>"  # the file name that Jinja gives to the code of a template
MAX_LOOKUPS = 1 << 19  # attributes and items that one rendering may look up: some seconds. A usual message costs 5 to 30

SHARE_LOOKUPS = 256  # lookups between two pauses of a rendering beside the event loop: about 1 ms
SHARE_SECONDS = 0.0001  # a pause: enough for a waiting thread to wake up and take the interpreter lock


class TemplateRefusal(Exception):
    """Raised when a template calls `raise_exception`. It carries the template's message."""


class TooMuchWork(Exception):
    """Raised when a rendering exceeds MAX_LOOKUPS."""


FAILURES = (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RuntimeError, MemoryError)
"""Errors of a template that gets messages of a shape that it does not expect."""
RENDER_ERRORS = (*FAILURES, TemplateRefusal, TooMuchWork)


class _Budget:
    """What one rendering may still do. `shares` says that other threads should run in between."""

    __slots__ = ("left", "shares")

    def __init__(self) -> None:
        self.left = MAX_LOOKUPS
        self.shares = threading.current_thread() is not threading.main_thread()


_budget: ContextVar[_Budget | None] = ContextVar("budget", default=None)


@contextmanager
def bounded_work() -> Iterator[None]:
    """Bound the lookups of one rendering, which runs inside the `with` block, to MAX_LOOKUPS.

    Outside the main thread, a rendering gives up the interpreter lock every few hundred lookups. Otherwise the event loop, which
    runs in the main thread, would wait for it for 5 ms each time.
    """
    token = _budget.set(_Budget())
    try:
        yield
    finally:
        _budget.reset(token)


class TemplateEnvironment(ImmutableSandboxedEnvironment):
    """A sandbox with everything that a chat template may use."""

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols])
        self.filters["tojson"] = _to_json
        self.globals.update(
            raise_exception=_raise_exception, strftime_now=_strftime_now, dict=_DictMaker(), namespace=_PublicNamespace
        )

    def getitem(self, obj: Any, argument: Any) -> Any:
        _count_lookup()
        return super().getitem(obj, argument)

    def getattr(self, obj: Any, attribute: str) -> Any:
        _count_lookup()
        return super().getattr(obj, attribute)


def _count_lookup() -> None:
    budget = _budget.get()
    if budget is None:  # a constant expression, which Jinja computes while it compiles a template
        return
    budget.left -= 1
    if budget.left < 0:
        raise TooMuchWork
    if budget.shares and not budget.left % SHARE_LOOKUPS:
        time.sleep(SHARE_SECONDS)


class _GenerationTag(Extension):
    """The tag pair `generation`, `endgeneration`. It marks for training what the model wrote, and renders its body.

    The body is a call block and not plain statements, so that a variable that is set in the body ends with it.
    """

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Macro) -> str:
        return str(caller())


class _DictMaker:
    """The function `dict`. The class itself would give templates more than the two ways to make a dict."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, keys: Iterable[Any], value: Any = None) -> dict[Any, Any]:
        return dict.fromkeys(keys, value)


class _PublicNamespace(Namespace):
    """The function `namespace`. Names that begin with an underscore are refused, as transformers does."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # a namespace may have an attribute `self`
        attributes: Mapping[Any, Any] = dict(*args[1:], **kwargs)
        for name in attributes:
            _check_public(name)
        Namespace.__init__(args[0], attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_public(name)
        super().__setitem__(name, value)


def _check_public(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError("a namespace has no names that begin with an underscore")


def _raise_exception(message: Any) -> NoReturn:
    raise TemplateRefusal(str(message))


def _to_json(
    x: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Format `x` as JSON. Jinja's own `tojson` would escape <, > and & for HTML, and has other arguments."""
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(format: str) -> str:
    # The time has no zone, since transformers renders %Z and %z as nothing.
    return datetime.datetime.now().strftime(format)
