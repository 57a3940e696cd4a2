"""Looks at an endpoint before a load: is it there, is it what the user thinks it is, what does it say about itself.

Everything that would fail for each request of the load is found here with one request, and named with its remedy.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import urllib.error
import urllib.parse
import urllib.request
from typing import Any

import msgspec
import numpy as np

from loadtest.clients import build_client
from loadtest.clients.base import Call, Client
from loadtest.clients.grpc_client import describe_grpc, grpc_has_id
from loadtest.plan import Plan, longest
from loadtest.prompts import Prompt, Prompts
from loadtest.record import Failure, Reading
from loadtest.spec import Load, LoadError, Target

_TIMEOUT = 30.0
USUAL_VOCAB = 10_000  # token ids of a load by default, for all models that have as many, so that their loads are equal
_FEW, _MANY = 50, 350  # words of the two prompts that measure the endpoint's tokens for each word


def probe(target: Target, load: Load) -> Target:
    """Return the target with what the endpoint says. Raises LoadError if the load cannot run there."""
    target = describe_grpc(target) if target.route == "grpc" else _described(target)
    if not target.vocab:
        target = msgspec.structs.replace(target, vocab=_vocab(target))
    target = asyncio.run(_tried(target, load))
    if target.context is not None and (most := longest(load)) > target.context:
        raise LoadError(
            f"{load.name}: a request may have {most} tokens, prompt and output together, but {target.model} at {target.url} "
            f"takes {target.context}; choose shorter lengths"
        )
    return target


def _described(target: Target) -> Target:
    """Add what GET /v1/models says: the model's name and its context."""
    try:
        parts = urllib.parse.urlsplit(target.url)
        usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # brackets that do not match, or a port that is no number
        usable = False
    if not usable:
        raise LoadError(f"{target.url!r} is no URL of a server: write http://HOST:PORT")
    if target.url.rstrip("/").endswith("/v1"):
        target = msgspec.structs.replace(target, url=target.url.rstrip("/").removesuffix("/v1"))
    url = target.url.rstrip("/") + "/v1/models"
    try:
        cards = _get(url, target.api_key)["data"]
        named = {str(card["id"]): card for card in cards}
    except urllib.error.HTTPError as error:
        error.close()
        raise LoadError(f"GET {url} answered {error.code}: {_remedy(error.code)}") from None
    except (urllib.error.URLError, TimeoutError, OSError) as error:
        reason = getattr(error, "reason", error)
        raise LoadError(f"{target.url} cannot be reached: {reason}; is the server running, and is this its address?") from None
    except http.client.HTTPException as error:
        raise LoadError(f"GET {url} was not answered in HTTP ({type(error).__name__}): is this the server's HTTP port?") from None
    except (ValueError, KeyError, TypeError):
        raise LoadError(f"GET {url} did not answer a list of models: {target.url} is no OpenAI-compatible endpoint") from None
    if not named:
        raise LoadError(f"GET {url} lists no model")
    name = target.model or next(iter(named))
    if name not in named:
        raise LoadError(f"{target.url} has no model {name!r}: it has {', '.join(named)}")
    context = named[name].get("max_model_len")
    ours = named[name].get("owned_by") == "tidegate"
    return msgspec.structs.replace(target, model=name, context=context if isinstance(context, int) else None, is_tidegate=ours)


def _vocab(target: Target) -> int:
    """Return the number of token ids that prompts use: USUAL_VOCAB, or fewer if the model has fewer. Tidegate is asked by
    detokenization, which refuses an id that the model does not have. Other servers are not asked: the first request shows."""
    if not target.is_tidegate or _has_id(target, USUAL_VOCAB - 1):
        return USUAL_VOCAB
    low, high = 0, USUAL_VOCAB - 1  # the model has the id `low` and not the id `high`
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if _has_id(target, middle) else (low, middle)
    return high


def _has_id(target: Target, token: int) -> bool:
    if target.route == "grpc":
        return grpc_has_id(target, token)
    try:
        _get(target.url.rstrip("/") + "/detokenize", target.api_key, {"tokens": [token]})
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 400:
            return False
        raise LoadError(
            f"POST {target.url}/detokenize answered {error.code}; name the model's number of ids with --vocab"
        ) from None
    return True


def _get(url: str, api_key: str | None, body: object = None) -> Any:
    headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data=data, headers={**headers, "content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=_TIMEOUT) as response:
        return json.load(response)


def _remedy(status: int) -> str:
    if status in (401, 403):
        return "the endpoint wants another key; give it with --api-key"
    return "this is no OpenAI-compatible endpoint, or it is not ready"


async def _tried(target: Target, load: Load) -> Target:
    """Send one short request, or those that measure the tokenizer, and return what they tell about the target."""
    client = build_client(target, load)
    try:
        if target.as_text or target.route == "chat":
            return await _with_tokenizer(client, target, load)
        # The highest id of the load is in the prompt, so that a vocabulary that is too large shows now.
        await _one(client, target, load, Prompt(ids=np.array([target.vocab - 1] * 4, dtype=np.int32)))
        return target
    finally:
        await client.close()


async def _with_tokenizer(client: Client, target: Target, load: Load) -> Target:
    counts = []
    for words in (_FEW, _MANY):
        text = Prompts(Plan(load), target).words(np.random.default_rng(words), words)
        prompt = Prompt(messages=[{"role": "user", "content": text}]) if target.route == "chat" else Prompt(text=text)
        reading = await _one(client, target, load, prompt)
        if reading.prompt_tokens is None:
            raise LoadError(f"{target.url} reports no usage, so the length of a prompt of text cannot be set; use token ids")
        counts.append(reading.prompt_tokens)
    per_word = (counts[1] - counts[0]) / (_MANY - _FEW)
    if per_word <= 0:
        raise LoadError(
            f"{target.url} counts {counts[0]} tokens for {_FEW} words and {counts[1]} for {_MANY}: its usage is wrong"
        )
    return msgspec.structs.replace(target, tokens_per_word=per_word, template_tokens=counts[0] - per_word * _FEW)


async def _one(client: Client, target: Target, load: Load, prompt: Prompt) -> Reading:
    reading = Reading()
    try:
        async with asyncio.timeout(max(_TIMEOUT, load.timeout)):
            await client.stream(Call(prompt, 2, load.slo_class), reading)
    except TimeoutError:
        raise LoadError(f"{target.url} did not answer a request of 2 tokens in {max(_TIMEOUT, load.timeout):g} s") from None
    except Failure as failure:
        raise LoadError(
            f"{target.url}, route {target.route}: a first request failed: {failure}. {_hint(failure, target)}"
        ) from None
    if not reading.events:
        raise LoadError(f"{target.url}, route {target.route}: the stream of a first request had no token")
    return reading


def _hint(failure: Failure, target: Target) -> str:
    status = failure.status.split()[0]
    if status in ("401", "403", "UNAUTHENTICATED"):
        return "Give the key with --api-key."
    if status == "no":
        return "Is the server running, and is this its address?"
    if status in ("404", "405", "UNIMPLEMENTED"):
        return f"The server may lack the route {target.route}: try --route completions or chat."
    if "token" in failure.detail or "vocab" in failure.detail:
        return f"Prompts have token ids up to {target.vocab - 1}: name the model's number of ids with --vocab, or use --text."
    return "If the server does not know one of the fields, see --no-ignore-eos, --slo-class and --deadline-ms."
