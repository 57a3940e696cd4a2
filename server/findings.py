"""Finding: a row of the doctor's report, and how the report is printed."""

from __future__ import annotations

import sys
from typing import Literal, NamedTuple

from rich.console import Console
from rich.markup import escape
from rich.table import Table

State = Literal["ok", "missing", "note"]  # "missing" means that `serve` would not start


class Finding(NamedTuple):
    """Holds what was checked, whether it is ok, and the details."""

    what: str
    state: State
    text: str


def report(findings: list[Finding]) -> int:
    """Print the findings, as a table at a terminal and else as plain lines. Returns the exit code: 1 if something is missing."""
    console = Console()
    if console.is_terminal:
        _print_table(console, findings)
    else:
        words = {"ok": "ok", "missing": "MISSING", "note": "-"}
        for finding in findings:
            sys.stdout.write(f"{words[finding.state]} {finding.what}: {finding.text}\n")
    return int(any(finding.state == "missing" for finding in findings))


def _print_table(console: Console, findings: list[Finding]) -> None:
    table = Table(box=None, show_header=False, pad_edge=False)
    marks = {"ok": "[green]ok[/]", "missing": "[red]MISSING[/]", "note": "[yellow]-[/]"}
    for finding in findings:
        table.add_row(marks[finding.state], escape(finding.what), escape(finding.text))
    console.print(table)
