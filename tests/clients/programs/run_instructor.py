"""Drives instructor, which makes an openai client return objects. Its modes with tools and formats are refused by the server;
its mode of Markdown blocks needs neither. With `response_model` None it passes calls through."""

from __future__ import annotations

import common
import instructor
import openai
import openai_shapes as shapes
import pydantic


class Person(pydantic.BaseModel):
    name: str = "nobody"


def calls(url: str, model: str) -> dict[str, common.Call]:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    chats = instructor.from_openai(client, mode=instructor.Mode.MD_JSON).chat.completions

    def structured(arguments, mode=instructor.Mode.MD_JSON):
        patched = instructor.from_openai(client, mode=mode).chat.completions
        person, answer = patched.create_with_completion(model=model, response_model=Person, max_retries=0, **arguments)
        return {"person": person.model_dump(), "text": answer.choices[0].message.content}

    def chat(arguments, **more):
        if arguments.pop("tools", None):
            return structured(arguments, instructor.Mode.TOOLS)
        if arguments.pop("response_format", None):
            return structured(arguments, instructor.Mode.JSON_SCHEMA)
        return shapes.chat(chats.create(response_model=None, **{"model": model, **arguments, **more}))

    def chat_stream(arguments):
        more = {"stream": True, "stream_options": {"include_usage": True}}
        return shapes.chat_stream(chats.create(model=model, response_model=None, **more, **arguments))

    def history(arguments):
        """Feed all fields of the answer's message back, null or not. Instructor takes no message objects."""
        first, then = arguments.pop("messages"), arguments.pop("then")
        message = chats.create(model=model, response_model=None, messages=first, **arguments).choices[0].message
        return chat({"messages": [*first, message.model_dump(), *then], **arguments})

    def cancel(arguments):
        ended = common.Ended(url)
        with chats.create(model=model, response_model=None, stream=True, **arguments) as stream:
            read = [next(stream) for _ in range(3)]
        return {"read": len(read), "ended": ended.wait()}

    return {
        "chat": chat,
        "chat_stream": chat_stream,
        "structured": structured,
        "unknown_model": lambda arguments: chat(arguments, model="nobody/nothing"),
        "history": history,
        "cancel": cancel,
        "timeout": lambda arguments: common.given_up(url, lambda: chat(arguments, timeout=1.0)),
        "concurrent": lambda arguments: common.at_once(chat, [{**arguments, "seed": s} for s in arguments.pop("seeds")]),
    }


common.run(calls)
