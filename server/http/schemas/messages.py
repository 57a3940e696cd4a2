"""Defines the messages of a conversation, and the fields that say how the model's chat template renders them.

POST /v1/chat/completions and POST /tokenize have these fields. An answer of this or of another server may come back as a message
of the history, with every field that clients' libraries put into it. What such a field holds beside the text has no effect if it
only describes the answer; it is refused by name if it is something that the model would have to be told.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, cast

from pydantic import (
    Discriminator,
    Field,
    StringConstraints,
    Tag,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)

from engine.errors import InvalidRequest, UnsupportedField
from server.http.schemas.common import Schema, at_most
from server.http.schemas.fields import without_unsupported
from server.text.conversation import Conversation

MAX_MESSAGES = 4096
MAX_VARIABLES = 64  # names in chat_template_kwargs
MAX_DOCUMENTS = 4096
_ROLES = ("system", "developer", "user", "assistant")
_REFUSED_IN_MESSAGE: dict[str, tuple[Any, ...]] = {
    "tool_calls": ([],),
    "function_call": (),
    "tool_call_id": (),
    "audio": (),
    "refusal": (),
    "images": ([],),
    "parsed": (),
    "reasoning_details": ([],),
    "thinking_blocks": ([],),
    "prefix": (False,),
    "partial": (False,),
}
# Names that the server itself gives to a template, or that are fields of their own.
RESERVED = frozenset(
    {
        "messages",
        "tools",
        "documents",
        "add_generation_prompt",
        "continue_final_message",
        "chat_template",
        "raise_exception",
        "strftime_now",
        "namespace",
        "range",
        "dict",
        "cycler",
        "joiner",
        "lipsum",
    }
)
Metadata = Annotated[Any, Field(description="Describes an earlier answer. It has no effect.")]


class TextPart(Schema):
    """A part of a message's content."""

    WHERE: ClassVar[str] = "messages[].content[]."

    type: Literal["text"]
    text: str
    annotations: Metadata = None
    cache_control: Annotated[
        dict[str, Any] | None, Field(description="A hint for servers that cache on request. This server always caches.")
    ] = None


def _content_kind(value: Any) -> str | None:
    return "#text" if isinstance(value, str) else "#parts" if isinstance(value, list) else None


Content = Annotated[
    Annotated[str, Tag("#text")] | Annotated[list[TextPart], Field(fail_fast=True, min_length=1), Tag("#parts")],
    Discriminator(
        _content_kind, custom_error_type="content_kind", custom_error_message="must be a string or a list of text parts"
    ),
]


class Message(Schema):
    """One message of a conversation."""

    WHERE: ClassVar[str] = "messages[]."

    role: Annotated[Literal["system", "developer", "user", "assistant"], Field(description="Who speaks.")]
    content: Annotated[
        Content | None, Field(description="A text, or a list of texts. Only an assistant's message may do without.")
    ] = None
    name: Annotated[
        Annotated[str, StringConstraints(max_length=512)] | None,
        Field(description="The speaker's name, for templates that show it."),
    ] = None
    reasoning_content: Annotated[
        str | None, Field(description="What the assistant thought before its answer, for templates that show it.")
    ] = None
    reasoning: Annotated[str | None, Field(description="Another name for reasoning_content.")] = None
    annotations: Metadata = None
    provider_specific_fields: Metadata = None


def _is_plain(message: Any) -> bool:
    """Return whether `message` has a known role, a text and nothing else. Such messages need no schema, and are the most."""
    return type(message) is dict and len(message) == 2 and message.get("role") in _ROLES and type(message.get("content")) is str


def _for_template(value: Any, handler: ValidatorFunctionWrapHandler) -> dict[str, Any]:
    """Validate a message, and return what a template gets of it, in the client's order of keys: a template can print it whole."""
    if _is_plain(value):
        return cast("dict[str, Any]", value)
    message: Message = handler(value)
    content: Any = message.content
    if isinstance(content, list):
        content = [{"type": part.type, "text": part.text} for part in content]
    fields = {"role": message.role, "content": content, "name": message.name}
    fields |= {"reasoning_content": message.reasoning_content, "reasoning": message.reasoning}
    return {key: fields[key] for key in value if fields.get(key) is not None}


Messages = Annotated[
    list[Annotated[Message, WrapValidator(_for_template)]],  # validated to a list of dictionaries
    Field(
        fail_fast=True,
        min_length=1,
        max_length=MAX_MESSAGES,
        description="The conversation so far.",
        examples=[[{"role": "user", "content": "Hello"}]],
    ),
]


class ChatFields(Schema):
    """Messages, and how the model's chat template renders them to a prompt."""

    messages: Messages | None = None
    add_generation_prompt: Annotated[
        bool | None,
        Field(description="End the prompt where the assistant's answer begins; true, unless continue_final_message is."),
    ] = None
    continue_final_message: Annotated[
        bool | None, Field(description="Continue the last message instead of answering it. The answer has only the new text.")
    ] = None
    add_special_tokens: Annotated[
        bool | None,
        Field(description="Add the special tokens of a prompt to what the template has written; false if left out."),
    ] = None
    chat_template: Annotated[
        str | None, Field(description="Name of one of the model's chat templates; its default if left out. Never a template.")
    ] = None
    chat_template_kwargs: Annotated[
        Annotated[dict[str, Any], at_most(MAX_VARIABLES)] | None,
        Field(description="Values for the chat template by name.", examples=[{"enable_thinking": False}]),
    ] = None
    documents: Annotated[
        Annotated[list[dict[str, Any]], Field(fail_fast=True, max_length=MAX_DOCUMENTS)] | None,
        Field(description="Documents for the chat template, if it uses any."),
    ] = None
    reasoning_effort: Annotated[
        Annotated[str, StringConstraints(min_length=1, max_length=32)] | None,
        Field(description="How long to think, if the chat template uses it; otherwise only medium, the default, is accepted."),
    ] = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_other_messages(cls, value: Any) -> Any:
        messages = value.get("messages") if isinstance(value, dict) else None
        if not isinstance(messages, list) or len(messages) > MAX_MESSAGES:
            return value
        return {**value, "messages": [_supported(message, f"messages[{i}]") for i, message in enumerate(messages)]}

    @model_validator(mode="after")
    def _template_fields_agree(self) -> ChatFields:
        if self.add_generation_prompt and self.continue_final_message:
            raise InvalidRequest(
                "add_generation_prompt and continue_final_message exclude each other: give one of them",
                param="continue_final_message",
            )
        variables = self.chat_template_kwargs or {}
        for name in variables:
            if name in RESERVED:
                why = f"give {name} itself" if name in type(self).model_fields else "the server sets it"
                raise InvalidRequest(
                    f"chat_template_kwargs may not have {name}: {why}",
                    param=f"chat_template_kwargs.{name}",
                )
        effort = self.reasoning_effort
        if effort is not None and variables.get("reasoning_effort", effort) != effort:
            raise InvalidRequest(
                "reasoning_effort and chat_template_kwargs.reasoning_effort differ: give one of them", param="reasoning_effort"
            )
        return self

    @property
    def conversation(self) -> Conversation:
        """What to render."""
        continues = bool(self.continue_final_message)
        return Conversation(
            messages=cast("list[dict[str, Any]]", self.messages or []),
            template=self.chat_template,
            variables=self.chat_template_kwargs or {},
            documents=self.documents,
            reasoning_effort=self.reasoning_effort,
            add_generation_prompt=not continues if self.add_generation_prompt is None else self.add_generation_prompt,
            continue_final_message=continues,
        )


def _supported(message: Any, path: str) -> Any:
    """Return `message` without unsupported fields whose values have no effect.

    Raises UnsupportedField for roles and fields that OpenAI defines and this server does not support and for content parts of
    any type but text, and InvalidRequest for a message that must have content and has none.
    """
    if _is_plain(message) or not isinstance(message, dict):
        return message
    role, content = message.get("role"), message.get("content")
    if role in ("tool", "function"):
        raise UnsupportedField(
            "this server does not support messages of tools: use the roles system, developer, user and assistant",
            param=f"{path}.role",
        )
    if role not in _ROLES:
        raise InvalidRequest(f"{path}.role must be system, developer, user or assistant", param=f"{path}.role")
    if content is None and role != "assistant":
        raise InvalidRequest(f"{path}.content is required: it must be a string or a list of text parts", param=f"{path}.content")
    for j, part in enumerate(content if isinstance(content, list) else ()):
        if isinstance(part, dict) and isinstance(part.get("type"), str) and part["type"] != "text":
            raise UnsupportedField("this server supports content of type text only", param=f"{path}.content[{j}].type")
    return without_unsupported(message, _REFUSED_IN_MESSAGE, path=f"{path}.")
