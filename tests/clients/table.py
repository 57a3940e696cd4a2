"""Prints the table of docs/clients.md: which client makes which calls, in which version. A test holds the page to it."""

from __future__ import annotations

import json

from tests.clients.clients import CLIENTS, Client
from tests.clients.install import LOCKS

# Row -> the calls that a client must make for a "yes".
FEATURES = {
    "chat, streamed, with usage": ("chat", "chat_stream"),
    "completions, streamed": ("completion", "completion_stream"),
    "sampling, seed": ("chat_sampled",),
    "stop": ("chat_stop", "chat_stop_stream"),
    "role developer": ("chat_developer",),
    "our own fields": ("chat_extra_fields",),
    "n": ("chat_n",),
    "n streamed": ("chat_n_stream",),
    "logprobs": ("chat_logprobs",),
    "echo": ("completion_echo",),
    "answer fed back": ("history",),
    "leaves a stream": ("cancel",),
    "times out": ("timeout",),
    "8 at once": ("concurrent",),
}


# Row -> the call and the kind of error that clients.py names the exception by.
ERRORS = (
    ("prompt too long", "context_too_long", "context"),
    ("unknown model", "unknown_model", "not_found"),
    ("value out of range", "wrong_value", "bad_request"),
    ("tools", "tools", "bad_request"),
    ("JSON schema", "json_schema", "bad_request"),
    ("time-out", "timeout", "timeout"),
)


def version(client: Client) -> str:
    """Return the version of the client's package that the lock files pin."""
    if client.environment == "node":
        packages = json.loads((LOCKS / "package-lock.json").read_text())["packages"]
        return str(packages[f"node_modules/{client.package}"]["version"])
    pinned = dict(line.split("==") for line in (LOCKS / f"{client.environment}.txt").read_text().splitlines())
    return pinned[client.package]


def rows() -> list[list[str]]:
    """Return the table: a column for each client, a row for each feature, and the exceptions at the end."""
    clients = CLIENTS.values()
    found = [["", *CLIENTS], ["package", *(f"{client.package} {version(client)}" for client in clients)]]
    for feature, calls in FEATURES.items():
        found.append([feature, *("yes" if set(calls) <= set(client.calls) else "-" for client in clients)])
    for about, call, kind in ERRORS:
        found.append([about, *(f"`{client.error(call, kind).rpartition('.')[2]}`" for client in clients)])
    return found


def table() -> str:
    head, *others = (f"| {' | '.join(row)} |" for row in rows())
    return "\n".join([head, "|---" * (len(CLIENTS) + 1) + "|", *others])


if __name__ == "__main__":
    print(table())
