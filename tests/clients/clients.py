"""Lists the clients that have a program in tests/clients/programs/, the calls that each makes, and the exceptions it raises."""

from __future__ import annotations

from dataclasses import dataclass, field

from tests.clients import install
from tests.clients.cases import ANSWERED, ENDED, GREEDY, OTHERS, PARTS, PROMPT, REFUSED, STOPPED, Case

ALL = (*ANSWERED, *STOPPED, *OTHERS, *REFUSED, *ENDED)
ONLY_OPENAI = ("models", "request_id", "responses")  # calls that only OpenAI's own clients have

PLAIN_COMPLETIONS = ("completion_n", "completion_logprobs", "completion_echo")


def without(*left_out: str) -> tuple[str, ...]:
    """Return the names of all calls but those that begin with one of `left_out`."""
    return tuple(name for name in ALL if not name.startswith(left_out))


@dataclass(frozen=True)
class Client:
    environment: str
    package: str
    script: str
    calls: tuple[str, ...]
    errors: dict[str, str]  # kind of error in REFUSED, or name of a call -> the class that the client's user catches
    hidden: dict[str, tuple[str, ...]] = field(default_factory=dict)  # call -> what the client does not show of its answer
    instead: dict[str, Case] = field(default_factory=dict)  # call -> the call that the client makes of it, for the raw answer

    def error(self, call: str, kind: str) -> str:
        """Return the class of the exception that the client raises for a call that the server refuses."""
        return self.errors.get(call, self.errors[kind])

    @property
    def command(self) -> list[str]:
        if self.script.endswith(".mjs"):
            return install.node_command(self.script)
        return [str(install.program(self.environment, "python")), str(install.PROGRAMS / self.script)]


OPENAI_ERRORS = {
    "bad_request": "openai.BadRequestError",
    "context": "openai.BadRequestError",
    "not_found": "openai.NotFoundError",
    "timeout": "openai.APITimeoutError",
}
PYDANTIC_AI = "pydantic_ai.exceptions."
INSTRUCTOR_FAILS = "instructor.v2.core.errors.InstructorRetryException"
LANGCHAIN = "langchain_openai.chat_models.base."

# The AI SDK makes a conversation of a prompt, for a model of completions too.
_AS_CONVERSATION = {"prompt": f"user:\n{PROMPT['prompt']}\n\nassistant:\n", "stop": ["\nuser:"]}
# LlamaIndex sends the parts of a text as one text.
_JOINED = [{**PARTS[0], "content": "".join(part["text"] for part in PARTS[0]["content"])}]

CLIENTS = {
    "openai": Client("openai", "openai", "run_openai.py", ALL, OPENAI_ERRORS),
    "litellm": Client(
        "openai",
        "litellm",
        "run_litellm.py",
        without(*ONLY_OPENAI),
        {
            "bad_request": "litellm.exceptions.BadRequestError",
            "context": "litellm.exceptions.ContextWindowExceededError",
            "not_found": "litellm.exceptions.NotFoundError",
            "timeout": "litellm.exceptions.Timeout",
        },
        hidden={"chat_n_stream": ("finish_reason",)},  # litellm sends one finish_reason for the whole stream
    ),
    "openai-node": Client(
        "node",
        "openai",
        "openai_node.mjs",
        without("history_dumped"),
        {
            "bad_request": "BadRequestError",
            "context": "BadRequestError",
            "not_found": "NotFoundError",
            "timeout": "APIConnectionTimeoutError",
        },
    ),
    "ai-sdk": Client(
        "node",
        "ai",
        "ai_sdk.mjs",
        without(*ONLY_OPENAI, "history_dumped", "chat_developer", "chat_n", "chat_logprobs", *PLAIN_COMPLETIONS),
        {"bad_request": "APICallError", "context": "APICallError", "not_found": "APICallError", "timeout": "DOMException"},
        instead=dict.fromkeys(("completion", "completion_stream"), Case("completion", PROMPT | _AS_CONVERSATION)),
    ),
    "langchain": Client(
        "langchain",
        "langchain-openai",
        "run_langchain.py",
        without(*ONLY_OPENAI, "history_dumped", "chat_n_stream"),
        {
            "bad_request": LANGCHAIN + "OpenAIInvalidRequestError",
            "context": LANGCHAIN + "OpenAIContextOverflowError",
            "not_found": LANGCHAIN + "OpenAIModelNotFoundError",
            "timeout": LANGCHAIN + "OpenAITimeoutError",
        },
        hidden={"completion_stream": ("finish_reason", "logprobs", "usage")},  # a stream of a completion is plain strings
    ),
    "pydantic-ai": Client(
        "langchain",
        "pydantic-ai-slim",
        "run_pydantic_ai.py",
        without(*ONLY_OPENAI, "history_dumped", "chat_developer", "chat_n", "completion"),
        {
            "bad_request": PYDANTIC_AI + "ModelRequestRejectedError",
            "context": PYDANTIC_AI + "ModelContextWindowExceededError",
            "not_found": PYDANTIC_AI + "ModelNotFoundError",
            "timeout": PYDANTIC_AI + "ModelTimeoutError",
        },
    ),
    "llama-index": Client(
        "llama_index",
        "llama-index-llms-openai-like",
        "run_llama_index.py",
        # LlamaIndex fails on an echo, whose first token has no alternatives.
        without(*ONLY_OPENAI, "history_dumped", "completion_echo"),
        OPENAI_ERRORS,
        instead={"chat_parts": Case("chat", {**GREEDY, "messages": _JOINED})},
    ),
    "instructor": Client(
        "llama_index",
        "instructor",
        "run_instructor.py",
        without(*ONLY_OPENAI, "history_dumped", "completion", "tools_stream"),
        {**OPENAI_ERRORS, "tools": INSTRUCTOR_FAILS, "json_schema": INSTRUCTOR_FAILS},
    ),
}
