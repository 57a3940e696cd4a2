"""Drives litellm, as a library, with its provider for servers that are compatible with OpenAI's."""

from __future__ import annotations

import functools

import common
import litellm
import openai_shapes as shapes

TEXT_PROVIDER, CHAT_PROVIDER = "text-completion-openai", "openai"


def calls(url: str, model: str) -> dict[str, common.Call]:
    options = {"api_base": f"{url}/v1", "api_key": "none", "max_retries": 0}
    ask = functools.partial(litellm.completion, f"{CHAT_PROVIDER}/{model}", **options)
    write = functools.partial(litellm.text_completion, model=f"{TEXT_PROVIDER}/{model}", **options)

    def chat(arguments):
        return shapes.chat(ask(**arguments))

    def chat_stream(arguments):
        return shapes.chat_stream(ask(stream=True, stream_options={"include_usage": True}, **arguments))

    def completion(arguments):
        return shapes.completion(write(**arguments))

    def completion_stream(arguments):
        return shapes.completion_stream(write(stream=True, stream_options={"include_usage": True}, **arguments))

    def unknown_model(arguments):
        return shapes.chat(litellm.completion("openai/nobody/nothing", **options, **arguments))

    def history(arguments, form=lambda message: message):
        first, then = arguments.pop("messages"), arguments.pop("then")
        message = ask(messages=first, **arguments).choices[0].message
        return shapes.chat(ask(messages=[*first, form(message), *then], **arguments))

    def history_dumped(arguments):
        return history(arguments, lambda message: message.model_dump())

    def cancel(arguments):
        ended = common.Ended(url)
        stream = ask(stream=True, **arguments)
        read = [next(stream) for _ in range(3)]
        stream.completion_stream.close()
        return {"read": len(read), "ended": ended.wait()}

    def timeout(arguments):
        return common.given_up(url, lambda: ask(timeout=1.0, **arguments))

    def concurrent(arguments):
        return common.at_once(chat, ({**arguments, "seed": seed} for seed in arguments.pop("seeds")))

    return {
        "chat": chat,
        "chat_stream": chat_stream,
        "completion": completion,
        "completion_stream": completion_stream,
        "unknown_model": unknown_model,
        "history": history,
        "history_dumped": history_dumped,
        "cancel": cancel,
        "timeout": timeout,
        "concurrent": concurrent,
    }


common.run(calls)
