"""Helpers for tests of GenerateService: they make requests and a service with a LocalEngine, and collect a call's outputs."""

from engine.fake import expected_tokens
from engine.request import SamplingParams
from server.metrics.registry import Metrics
from server.service.service import GenerateService
from server.service.types import Ending, GenerationRequest
from server.settings import Settings
from server.text.chat import ChatTemplate
from server.text.chat_templates import ChatTemplates
from server.text.tokenizer import Tokenizer
from tests.support.local_engine import LIMITS
from tests.support.tiny_checkpoint import CHAT_TEMPLATE, tiny_tokenizer
from tests.unit.server.metrics.test_registry import conserved, samples, total

TEMPLATE = ChatTemplate(CHAT_TEMPLATE, {"bos_token": "<|begin|>", "eos_token": "<|end|>"})
TEXT = Tokenizer(tiny_tokenizer(), chat=ChatTemplates.of(TEMPLATE))
SETTINGS = Settings(served_model_name="tiny", max_n=4)
PROMPT = [7, 8, 9]


def service_over(engine):
    return GenerateService(engine, TEXT, SETTINGS, Metrics("tiny", lambda: engine.health))


def request(prompt=PROMPT, id="r", n=1, stop=(), model=None, deadline_s=None, **params):
    params.setdefault("ignore_eos", True)
    return GenerationRequest(
        request_id=id, prompt=prompt, params=SamplingParams(**params), n=n, stop=stop, model=model, deadline_s=deadline_s
    )


async def outputs_of(service, sent, identity=None):
    """Run `sent` to its end. Returns the tokens, the text and the last chunk of each output, and the Ending.

    Asserts that there is one Ending and that it is the last item.
    """
    items = [item async for item in service.generate(sent, identity)]
    endings = [item for item in items if isinstance(item, Ending)]
    assert len(endings) == 1
    assert items[-1] is endings[0]
    outputs = []
    for index in range(sent.n):
        chunks = [item for item in items[:-1] if item.index == index]
        assert [chunk.finish_reason is not None for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
        tokens = [token for chunk in chunks for token in chunk.token_ids]
        outputs.append((tokens, "".join(chunk.text for chunk in chunks), chunks[-1]))
    return outputs, endings[0]


def expected(num, seed, prompt=PROMPT):
    return expected_tokens(prompt, num, SamplingParams(ignore_eos=True, max_tokens=num), seed, LIMITS)


def counts(service):
    found = samples(service._metrics)
    assert conserved(found)
    ends = {end: total(found, f"tidegate_requests_{end}_total") for end in ("started", "finished", "aborted", "failed")}
    return ends | {"running": total(found, "tidegate_requests_running")}


async def running(service, sent):
    """Call `generate` and wait for its first chunk. Returns the generator, whose request still runs."""
    stream = service.generate(sent)
    await anext(stream)
    return stream
