"""Drives LlamaIndex's model for servers that are like OpenAI's."""

from __future__ import annotations

import gc
from typing import Any

import common
import openai_shapes as shapes
from llama_index.core.base.llms.types import ChatMessage
from llama_index.llms.openai_like import OpenAILike

OWN = ("max_tokens", "temperature")  # arguments that LlamaIndex has itself; all others go into additional_kwargs


def messages_of(given: list[dict[str, Any]]) -> list[ChatMessage]:
    """Translate messages. LlamaIndex calls the parts of a message blocks."""
    parts = [m["content"] if isinstance(m["content"], list) else [{"text": m["content"]}] for m in given]
    blocks = [[{"block_type": "text", "text": part["text"]} for part in each] for each in parts]
    return [ChatMessage(role=message["role"], blocks=each) for message, each in zip(given, blocks, strict=True)]


def calls(url: str, model: str) -> dict[str, common.Call]:
    def llm(arguments, *, is_chat_model=True, **more):
        given = {
            "model": model,
            "additional_kwargs": {name: value for name, value in arguments.items() if name not in OWN},
            **{name: value for name, value in arguments.items() if name in OWN},
            **more,
        }
        return OpenAILike(api_base=f"{url}/v1", api_key="none", max_retries=0, is_chat_model=is_chat_model, **given)

    def chat(arguments, **more):
        messages = messages_of(arguments.pop("messages"))
        return shapes.chat(llm(arguments, **more).chat(messages).raw)

    def chat_stream(arguments):
        messages = messages_of(arguments.pop("messages"))
        stream = llm({**arguments, "stream_options": {"include_usage": True}}).stream_chat(messages)
        return shapes.chat_stream(response.raw for response in stream)

    def completion(arguments):
        prompt = arguments.pop("prompt")
        return shapes.completion(llm(arguments, is_chat_model=False).complete(prompt).raw)

    def completion_stream(arguments):
        prompt = arguments.pop("prompt")
        given = {**arguments, "stream_options": {"include_usage": True}}
        return shapes.completion_stream(response.raw for response in llm(given, is_chat_model=False).stream_complete(prompt))

    def history(arguments):
        """Feed the answer's own ChatMessage back as history."""
        first, then = messages_of(arguments.pop("messages")), messages_of(arguments.pop("then"))
        talker = llm(arguments)
        return shapes.chat(talker.chat([*first, talker.chat(first).message, *then]).raw)

    def cancel(arguments):
        ended = common.Ended(url)
        messages = messages_of(arguments.pop("messages"))
        stream = llm(arguments).stream_chat(messages)
        read = len([next(stream) for _ in range(3)])
        # Closing LlamaIndex's generator does not close the client's stream below it. The garbage collector does.
        stream.close()
        gc.collect()
        return {"read": read, "ended": ended.wait()}

    def concurrent(arguments):
        return common.at_once(chat, [{**arguments, "seed": seed} for seed in arguments.pop("seeds")])

    return {
        "chat": chat,
        "chat_stream": chat_stream,
        "completion": completion,
        "completion_stream": completion_stream,
        "unknown_model": lambda arguments: chat(arguments, model="nobody/nothing"),
        "history": history,
        "cancel": cancel,
        "timeout": lambda arguments: common.given_up(url, lambda: chat(arguments, timeout=1.0)),
        "concurrent": concurrent,
    }


common.run(calls)
