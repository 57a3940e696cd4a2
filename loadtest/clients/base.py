"""What a client does."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from engine.slo import SloName
from loadtest.prompts import Prompt
from loadtest.record import Reading


class Call(NamedTuple):
    """One request to send."""

    prompt: Prompt
    max_tokens: int
    slo_class: SloName | None = None
    slow: bool = False


class Client(Protocol):
    async def stream(self, call: Call, reading: Reading) -> None:
        """Send one request and read its answer to the end. Raises Failure. Cancelling it ends the request at the server too."""
        ...

    async def close(self) -> None: ...
