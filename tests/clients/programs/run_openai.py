"""Drives the openai client for Python."""

from __future__ import annotations

import asyncio

import common
import openai
import openai_shapes as shapes


def calls(url: str, model: str) -> dict[str, common.Call]:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    chats, texts = client.chat.completions, client.completions

    def chat(arguments):
        return shapes.chat(chats.create(model=model, **arguments))

    def chat_stream(arguments):
        return shapes.chat_stream(chats.create(model=model, stream=True, stream_options={"include_usage": True}, **arguments))

    def completion(arguments):
        return shapes.completion(texts.create(model=model, **arguments))

    def completion_stream(arguments):
        return shapes.completion_stream(
            texts.create(model=model, stream=True, stream_options={"include_usage": True}, **arguments)
        )

    def unknown_model(arguments):
        return shapes.chat(chats.create(model="nobody/nothing", **arguments))

    def history(arguments):
        """Feed the answer's own message object back as history."""
        first, then = arguments.pop("messages"), arguments.pop("then")
        message = chats.create(model=model, messages=first, **arguments).choices[0].message
        return shapes.chat(chats.create(model=model, messages=[*first, message, *then], **arguments))

    def history_dumped(arguments):
        """Feed all fields of the answer's message back, null or not, as programs do that store conversations."""
        first, then = arguments.pop("messages"), arguments.pop("then")
        message = chats.create(model=model, messages=first, **arguments).choices[0].message
        return shapes.chat(chats.create(model=model, messages=[*first, message.model_dump(), *then], **arguments))

    def cancel(arguments):
        ended = common.Ended(url)
        with chats.create(model=model, stream=True, **arguments) as stream:
            read = [next(stream) for _ in range(3)]
        return {"read": len(read), "ended": ended.wait()}

    def timeout(arguments):
        impatient = client.with_options(timeout=1.0).chat.completions
        return common.given_up(url, lambda: impatient.create(model=model, **arguments))

    def concurrent(arguments):
        async def ask_all(seeds):
            async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as many:
                asked = (many.chat.completions.create(model=model, seed=seed, **arguments) for seed in seeds)
                return [shapes.chat(answer) for answer in await asyncio.gather(*asked)]

        return asyncio.run(ask_all(arguments.pop("seeds")))

    def models(arguments):
        return [*(card.id for card in client.models.list()), client.models.retrieve(model).id]

    def request_id(arguments):
        header = {"x-request-id": arguments.pop("id")}
        return chats.create(model=model, extra_headers=header, **arguments)._request_id

    def responses(arguments):
        return client.responses.create(model=model, **arguments).output_text

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
        "models": models,
        "request_id": request_id,
        "responses": responses,
    }


common.run(calls)
