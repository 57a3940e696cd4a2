"""Lists the calls that every client makes. The arguments have OpenAI's names; a client's program passes them on in the client's
own form. `tests/clients/raw.py` makes the same calls over plain HTTP and so gives the right answers."""

from __future__ import annotations

from typing import Any, NamedTuple

# The served model's name. Tools look for a model's tokenizer by its name, and this one is also the path of the model's folder.
MODEL = "checkpoints/tidepool"

ASK = [{"role": "system", "content": "You write Python."}, {"role": "user", "content": "def area(r):"}]
PARTS = [{"role": "user", "content": [{"type": "text", "text": "def area(r):"}, {"type": "text", "text": "return r"}]}]
THEN = [{"role": "user", "content": "And def volume(r):"}]
TOOL = {
    "type": "function",
    "function": {
        "name": "lookup",
        "description": "Looks a word up.",
        "parameters": {"type": "object", "properties": {"word": {"type": "string"}}, "required": ["word"]},
    },
}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "word", "schema": TOOL["function"]["parameters"]}}
GREEDY = {"messages": ASK, "max_tokens": 24, "temperature": 0}
PROMPT = {"prompt": "import os\n\ndef ", "max_tokens": 24, "temperature": 0}
# An answer that takes this machine about a minute, for calls that end before their answer does.
LONG = {**GREEDY, "max_tokens": 3000, "extra_body": {"ignore_eos": True}}


class Case(NamedTuple):
    """One call. `call` is the name of the function that makes it in a client's program."""

    call: str
    arguments: dict[str, Any]


ANSWERED = {
    "chat": Case("chat", GREEDY),
    "chat_stream": Case("chat_stream", GREEDY),
    "chat_parts": Case("chat", {**GREEDY, "messages": PARTS}),
    "chat_developer": Case("chat", {**GREEDY, "messages": [{**ASK[0], "role": "developer"}, *ASK[1:]]}),
    "chat_sampled": Case(
        "chat",
        {**GREEDY, "temperature": 0.9, "top_p": 0.9, "seed": 11, "presence_penalty": 0.5, "frequency_penalty": 0.5},
    ),
    "chat_n": Case("chat", {**GREEDY, "temperature": 0.8, "seed": 7, "n": 3}),
    "chat_n_stream": Case("chat_stream", {**GREEDY, "temperature": 0.8, "seed": 7, "n": 3}),
    "chat_logprobs": Case("chat", {**GREEDY, "max_tokens": 6, "logprobs": True, "top_logprobs": 3}),
    "chat_logprobs_stream": Case("chat_stream", {**GREEDY, "max_tokens": 6, "logprobs": True, "top_logprobs": 3}),
    "chat_extra_fields": Case("chat", {**GREEDY, "temperature": 0.9, "seed": 3, "extra_body": {"top_k": 2, "ignore_eos": True}}),
    "completion": Case("completion", PROMPT),
    "completion_stream": Case("completion_stream", PROMPT),
    "completion_n": Case(
        "completion", {**PROMPT, "prompt": ["import os\n", "import re\n"], "temperature": 0.8, "seed": 5, "n": 2}
    ),
    "completion_logprobs": Case("completion", {**PROMPT, "max_tokens": 4, "logprobs": 2}),
    "completion_echo": Case("completion", {**PROMPT, "max_tokens": 4, "logprobs": 2, "echo": True}),
    "history": Case("history", {**GREEDY, "then": THEN}),
    "history_dumped": Case("history_dumped", {**GREEDY, "then": THEN}),
    "concurrent": Case("concurrent", {**GREEDY, "temperature": 0.9, "seeds": list(range(8))}),
}


# Calls that must end at the strings in `stop`. The strings are set when the answer to GREEDY is known, of which they are a part.
STOPPED = {"chat_stop": Case("chat", GREEDY), "chat_stop_stream": Case("chat_stream", GREEDY)}


def stop_at(text: str) -> dict[str, Case]:
    """Return the calls of STOPPED for a text that must end within it."""
    middle = len(text) // 2
    stop = [text[middle : middle + 3], "nowhere to be found"]
    return {name: Case(case.call, {**case.arguments, "stop": stop}) for name, case in STOPPED.items()}


class Refusal(NamedTuple):
    """What the server says to a call that it refuses."""

    status: int
    code: str
    param: str | None


# Name -> (call, what the server answers, the kind of exception that the client raises).
REFUSED: dict[str, tuple[Case, Refusal, str]] = {
    "context_too_long": (
        Case("chat", {**GREEDY, "messages": [{"role": "user", "content": "so it goes " * 3000}]}),
        Refusal(400, "context_length_exceeded", "messages"),
        "context",
    ),
    # The newer API for chats, which examples of OpenAI's clients use.
    "responses": (Case("responses", {"input": "def area(r):"}), Refusal(404, "unknown_route", None), "not_found"),
    "unknown_model": (Case("unknown_model", GREEDY), Refusal(404, "model_not_found", "model"), "not_found"),
    "wrong_value": (
        Case("chat", {**GREEDY, "presence_penalty": 3}),
        Refusal(400, "invalid_value", "presence_penalty"),
        "bad_request",
    ),
    "tools": (Case("chat", {**GREEDY, "tools": [TOOL]}), Refusal(400, "unsupported_field", "tools"), "bad_request"),
    "tools_stream": (Case("chat_stream", {**GREEDY, "tools": [TOOL]}), Refusal(400, "unsupported_field", "tools"), "bad_request"),
    "json_schema": (
        Case("chat", {**GREEDY, "response_format": SCHEMA}),
        Refusal(400, "unsupported_field", "response_format"),
        "bad_request",
    ),
}
ENDED = {"cancel": Case("cancel", LONG), "timeout": Case("timeout", LONG)}
OTHERS = {"models": Case("models", {}), "request_id": Case("request_id", {**GREEDY, "id": "made-by-the-client-1"})}

# The bundled model writes no JSON by itself. The token " {}," with the stop string "," makes it answer " {}".
STRUCTURED = Case("structured", {**GREEDY, "logit_bias": {"6832": 100}, "stop": [","]})
