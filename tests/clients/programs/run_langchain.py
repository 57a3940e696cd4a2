"""Drives LangChain's models for OpenAI's API."""

from __future__ import annotations

import functools
import operator
from types import SimpleNamespace
from typing import Any

import common
import openai_shapes as shapes
from langchain_core.messages import convert_to_messages
from langchain_openai import ChatOpenAI, OpenAI


def tokens_of(message: Any) -> dict[str, int] | None:
    given = message.usage_metadata
    return given and {"prompt_tokens": given["input_tokens"], "completion_tokens": given["output_tokens"]}


def used(answer: Any) -> dict[str, int]:
    total = answer.llm_output["token_usage"]
    return {name: total[name] for name in ("prompt_tokens", "completion_tokens")}


def chat_logprobs(metadata: dict[str, Any]) -> list[Any] | None:
    content = (metadata.get("logprobs") or {}).get("content")
    return content and [[at["token"], at["logprob"], [[t["token"], t["logprob"]] for t in at["top_logprobs"]]] for at in content]


def chat_choice(message: Any) -> dict[str, Any]:
    metadata = message.response_metadata
    return {"text": message.content, "finish_reason": metadata["finish_reason"], "logprobs": chat_logprobs(metadata)}


def text_choice(generation: Any) -> dict[str, Any]:
    about = generation.generation_info
    logprobs = about["logprobs"] and shapes.text_logprobs(SimpleNamespace(**about["logprobs"]))
    return {"text": generation.text, "finish_reason": about["finish_reason"], "logprobs": logprobs}


def calls(url: str, model: str) -> dict[str, common.Call]:
    options = {"base_url": f"{url}/v1", "api_key": "none", "max_retries": 0}

    def bound(arguments, **more):
        """Return the messages, and a model for the other arguments. LangChain takes tools and formats by methods of its own."""
        messages, tools = arguments.pop("messages"), arguments.pop("tools", None)
        form = arguments.pop("response_format", None)
        chat_model = ChatOpenAI(**options, **{"model": model, **arguments, **more})
        if tools:
            return messages, chat_model.bind_tools(tools)
        if form:
            schema = {"title": form["json_schema"]["name"], **form["json_schema"]["schema"]}
            return messages, chat_model.with_structured_output(schema, method="json_schema")
        return messages, chat_model

    def chat(arguments, **more):
        if arguments.get("n"):
            return several(arguments)
        messages, chat_model = bound(arguments, **more)
        answer = chat_model.invoke(messages)
        return {"choices": [chat_choice(answer)], "usage": tokens_of(answer)}

    def several(arguments):
        """Ask with `generate`, since `invoke` returns one answer of several."""
        messages, chat_model = bound(arguments)
        answer = chat_model.generate([convert_to_messages(messages)])
        choices = [chat_choice(generation.message) for generation in answer.generations[0]]
        return {"choices": choices, "usage": used(answer)}

    def chat_stream(arguments):
        messages, chat_model = bound(arguments, stream_usage=True)
        chunks = list(chat_model.stream(messages))
        answer = functools.reduce(operator.add, chunks)
        pieces = sum(bool(chunk.content) for chunk in chunks)
        return {"choices": [chat_choice(answer)], "usage": tokens_of(answer), "pieces": pieces}

    def completion(arguments):
        prompts = arguments.pop("prompt")
        more = {name: arguments.pop(name) for name in ("echo",) if name in arguments}
        writer = OpenAI(**options, model=model, best_of=1, model_kwargs=more, **arguments)
        answer = writer.generate([prompts] if isinstance(prompts, str) else prompts)
        return {"choices": [text_choice(one) for many in answer.generations for one in many], "usage": used(answer)}

    def completion_stream(arguments):
        writer = OpenAI(**options, model=model, **{name: value for name, value in arguments.items() if name != "prompt"})
        pieces = [piece for piece in writer.stream(arguments["prompt"]) if piece]
        return {"choices": [{"text": "".join(pieces)}], "pieces": len(pieces)}

    def history(arguments):
        """Feed the answer's own AIMessage back as history."""
        first, then = arguments.pop("messages"), arguments.pop("then")
        messages, chat_model = bound({**arguments, "messages": first})
        answer = chat_model.invoke([*messages, chat_model.invoke(messages), *then])
        return {"choices": [chat_choice(answer)], "usage": tokens_of(answer)}

    def cancel(arguments):
        ended = common.Ended(url)
        messages, chat_model = bound(arguments)
        stream = chat_model.stream(messages)
        read = [next(stream) for _ in range(3)]
        stream.close()
        return {"read": len(read), "ended": ended.wait()}

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
