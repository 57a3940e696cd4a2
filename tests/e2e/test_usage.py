"""Tests that answers say how many tokens of the prompt were cached, and where, and that the metrics add up to the same."""

import json

import msgspec
import pytest

from engine.config import CacheConfig
from server.text.tokenizer import Tokenizer
from tests.support.http_api import MODEL, http_api
from tests.support.local_engine import CONFIG, LocalEngine, until
from tests.support.tiny_checkpoint import write_tiny_checkpoint
from tests.unit.server.metrics.test_registry import samples

BLOCK = 16
NUM_BLOCKS = 31
TEXT = "The tide comes in, and the tide goes out. " * 4
CACHE = CacheConfig(block_size=BLOCK, num_blocks=NUM_BLOCKS, host_tier_bytes=64 * CONFIG.fake.block_bytes)
FILLER = [*range(2, 2 + (NUM_BLOCKS - 1) * BLOCK)]  # a prompt that takes the place of all others in the device's cache


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return Tokenizer.from_folder(write_tiny_checkpoint(tmp_path_factory.mktemp("demo")))


@pytest.fixture
async def api(text):
    async with http_api(text, engine=LocalEngine(msgspec.structs.replace(CONFIG, cache=CACHE))) as api:
        yield api
        await api.quiet()


async def generated(api, *, stream, **prompt):
    body = {**(prompt or {"prompt": TEXT}), "max_tokens": 2, "ignore_eos": True, "stream": stream}
    answer = await api.http.post("/v1/generate", json=body)
    assert answer.status_code == 200, answer.text
    if not stream:
        return answer.json()["usage"]
    *_, last, done = answer.text.split("\n\n")[:-1]
    assert done == "data: [DONE]"
    return json.loads(last.removeprefix("data: "))["usage"]


async def of_openai(api, route, *, stream):
    """Return the usage that OpenAI's own client reads, with fields that it does not know."""
    create, prompt = {
        "completions": (api.openai.completions.create, {"prompt": TEXT}),
        "chat": (api.openai.chat.completions.create, {"messages": [{"role": "user", "content": TEXT}]}),
    }[route]
    body = {"model": MODEL, "max_tokens": 2, **prompt}
    if not stream:
        return (await create(**body)).usage
    chunks = [chunk async for chunk in await create(**body, stream=True, stream_options={"include_usage": True})]
    assert [chunk.usage is None for chunk in chunks] == [True] * (len(chunks) - 1) + [False]
    return chunks[-1].usage


def hits(api):
    """Return the metric of hits by tier, after checking that the tiers add up to all hits of the engine and of the service."""
    found = samples(api.service._metrics)
    of_tiers = {labels: value for (name, labels), value in found.items() if name == "tidegate_tier_hits_tokens_total"}
    by_tier = {dict(labels)["tier"]: value for labels, value in of_tiers.items()}
    assert sum(by_tier.values()) == found["tidegate_prefix_cache_hits_tokens_total", ()]
    assert sum(by_tier.values()) == found["tidegate_cached_tokens_total", ()]
    return by_tier


@pytest.mark.parametrize("stream", [False, True])
async def test_own_route_names_the_tiers(api, stream):
    usages = [
        await generated(api, stream=stream),
        await generated(api, stream=stream),
        await generated(api, stream=stream, prompt_token_ids=FILLER),
        await generated(api, stream=stream),
    ]
    cached = (usages[0]["prompt_tokens"] - 1) // BLOCK * BLOCK
    assert cached > 0
    nothing = {"gpu": 0, "host": 0, "disk": 0}
    expected = [nothing, nothing | {"gpu": cached}, nothing, nothing | {"host": cached}]
    assert [usage["cached_tokens_by_tier"] for usage in usages] == expected
    assert [usage["cached_tokens"] for usage in usages] == [sum(tiers.values()) for tiers in expected]
    assert hits(api) == {"gpu": cached, "host": cached}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("route", ["completions", "chat"])
async def test_openai_routes_have_the_fields_of_openai_and_of_deepseek(api, route, stream):
    usages = [await of_openai(api, route, stream=stream) for _ in range(2)]
    await generated(api, stream=False, prompt_token_ids=FILLER)
    usages.append(await of_openai(api, route, stream=stream))
    cached = (usages[0].prompt_tokens - 1) // BLOCK * BLOCK
    assert [usage.prompt_tokens_details.cached_tokens for usage in usages] == [0, cached, cached]
    for usage in usages:
        assert usage.prompt_cache_hit_tokens == usage.prompt_tokens_details.cached_tokens
        assert usage.prompt_cache_hit_tokens + usage.prompt_cache_miss_tokens == usage.prompt_tokens
    assert hits(api) == {"gpu": cached, "host": cached}


async def test_several_prompts_of_a_call_are_added_up_and_their_outputs_are_not(api):
    body = {"model": MODEL, "prompt": [TEXT, TEXT + "x" * 99], "n": 3, "max_tokens": 2}
    whole = [(await api.openai.completions.create(**body)).usage for _ in range(2)]
    lengths = [len(await api.service.tokenize(prompt)) for prompt in body["prompt"]]
    assert whole[1].prompt_tokens == sum(lengths)
    assert whole[1].prompt_cache_hit_tokens == sum((length - 1) // BLOCK * BLOCK for length in lengths)


async def test_tokens_that_were_read_from_disk_are_named(text, tmp_path):
    cache = msgspec.structs.replace(
        CACHE, host_tier_bytes=NUM_BLOCKS * 4096, disk_tier_folder=str(tmp_path / "kv"), disk_tier_bytes=1 << 20
    )
    fake = msgspec.structs.replace(CONFIG.fake, block_bytes=4096)
    engine = LocalEngine(msgspec.structs.replace(CONFIG, cache=cache, fake=fake))
    async with http_api(text, engine=engine) as api:
        first = await generated(api, stream=False)
        cached = (first["prompt_tokens"] - 1) // BLOCK * BLOCK
        await until(lambda: engine.tend() or engine.core.stats().tiers["disk"].num_demoted * BLOCK >= cached)
        for filler in (FILLER, FILLER[::-1]):
            await generated(api, stream=False, prompt_token_ids=filler)
        again = await generated(api, stream=False)
        assert again["cached_tokens_by_tier"] == {"gpu": 0, "host": 0, "disk": cached}
        assert again["cached_tokens"] == cached > 0
        assert hits(api) == {"gpu": 0, "host": 0, "disk": cached}
