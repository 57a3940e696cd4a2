"""Drives pydantic-ai's agents with its model for OpenAI's chat completions."""

from __future__ import annotations

import asyncio
from typing import Any

import common
import openai
from pydantic_ai import Agent, NativeOutput, StructuredDict, Tool
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

NAMES = {"stop": "stop_sequences", "logprobs": "openai_logprobs", "top_logprobs": "openai_top_logprobs"}


def lookup(word: str) -> str:
    """Look a word up."""
    raise AssertionError(f"the server refuses tools, so nothing asks for {word}")


def output_type(form: dict[str, Any] | None) -> Any:
    if form is None:
        return str
    return NativeOutput(StructuredDict(form["json_schema"]["schema"], name=form["json_schema"]["name"]))


def choice_of(response: Any) -> dict[str, Any]:
    logprobs = (response.provider_details or {}).get("logprobs")
    return {
        "text": response.text,
        "finish_reason": response.finish_reason,
        "logprobs": logprobs
        and [[at["token"], at["logprob"], [[t["token"], t["logprob"]] for t in at["top_logprobs"]]] for at in logprobs],
    }


def answer_of(run: Any, response: Any) -> dict[str, Any]:
    used = run.usage
    return {
        "choices": [choice_of(response)],
        "usage": {"prompt_tokens": used.input_tokens, "completion_tokens": used.output_tokens},
    }


def calls(url: str, model: str) -> dict[str, common.Call]:
    def agent_of(arguments, name=model):
        """Return an agent and the prompt. System messages become the agent's instructions."""
        messages, tools = arguments.pop("messages"), arguments.pop("tools", ())
        system = [message["content"] for message in messages if message["role"] == "system"]
        (prompt,) = (message["content"] for message in messages if message["role"] == "user")
        form = output_type(arguments.pop("response_format", None))
        settings = {NAMES.get(key, key): value for key, value in arguments.items()}
        client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        agent = Agent(
            OpenAIChatModel(name, provider=OpenAIProvider(openai_client=client)),
            instructions=system,
            model_settings=settings,
            output_type=form,
            tools=[Tool(lookup) for _ in tools],
            retries=0,
        )
        return agent, prompt if isinstance(prompt, str) else [part["text"] for part in prompt]

    async def chat(arguments, name=model):
        agent, prompt = agent_of(arguments, name)
        run = await agent.run(prompt)
        return answer_of(run, run.response)

    async def chat_stream(arguments):
        agent, prompt = agent_of(arguments)
        async with agent.run_stream(prompt) as run:
            pieces = [piece async for piece in run.stream_text(delta=True, debounce_by=None)]
        return {**answer_of(run, run.response), "pieces": len(pieces)}

    async def history(arguments):
        """Feed all messages of the first run back as history."""
        (then,) = arguments.pop("then")
        agent, prompt = agent_of(arguments)
        run = await agent.run(then["content"], message_history=(await agent.run(prompt)).all_messages())
        return answer_of(run, run.response)

    async def leave(arguments):
        agent, prompt = agent_of(arguments)
        read = 0
        async with agent.run_stream(prompt) as run:
            async for _ in run.stream_text(delta=True, debounce_by=None):
                read += 1
                if read == 3:
                    await run.cancel()
                    break
        return read

    def cancel(arguments):
        ended = common.Ended(url)
        return {"read": loop.run(leave(arguments)), "ended": ended.wait()}

    async def concurrent(arguments):
        seeds = arguments.pop("seeds")
        agent, prompt = agent_of(arguments)
        runs = await asyncio.gather(*(agent.run(prompt, model_settings={"seed": seed}) for seed in seeds))
        return [answer_of(run, run.response) for run in runs]

    loop = asyncio.Runner()
    return {
        "chat": lambda arguments: loop.run(chat(arguments)),
        "chat_stream": lambda arguments: loop.run(chat_stream(arguments)),
        "unknown_model": lambda arguments: loop.run(chat(arguments, "nobody/nothing")),
        "history": lambda arguments: loop.run(history(arguments)),
        "cancel": cancel,
        "timeout": lambda arguments: common.given_up(url, lambda: asyncio.run(chat({**arguments, "timeout": 1.0}))),
        "concurrent": lambda arguments: loop.run(concurrent(arguments)),
    }


common.run(calls)
