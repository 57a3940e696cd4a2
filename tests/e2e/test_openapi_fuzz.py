"""Fuzzes the HTTP API: schemathesis generates requests from the OpenAPI document, and the real service must answer as
documented."""

import msgspec
import pytest
import schemathesis
from schemathesis.config import SchemathesisConfig
from schemathesis.engine import events, from_schema

from server.http.app import build_app
from server.http.routes.api import Api
from server.metrics.registry import Metrics
from server.service.service import GenerateService
from server.settings import Settings
from server.text.tokenizer import Tokenizer
from tests.contract.test_openapi import OPERATIONS
from tests.support.local_engine import LIMITS, LocalEngine
from tests.support.tiny_checkpoint import write_tiny_checkpoint
from tests.unit.server.http.routes.scripted import ScriptedService

# A chat without max_tokens generates up to the end of the context. With 512 tokens that would be most of the test's time.
SHORT = msgspec.structs.replace(LIMITS, max_model_len=128)


def whole_app(text):
    """Build the HTTP application over the real service. schemathesis runs each request in a new event loop, so each request gets
    a new engine."""
    settings = Settings(served_model_name="tiny")
    health = []
    metrics = Metrics("tiny", lambda: health[-1])
    app = build_app(settings, ScriptedService(), metrics)

    async def with_engine(scope, receive, send):
        if scope["type"] != "http":
            await app(scope, receive, send)
            return
        async with LocalEngine(limits=SHORT) as engine:
            health[:] = [engine.health]
            service = GenerateService(engine, text, settings, metrics)
            app.state.api = Api.from_settings(settings, service, metrics)
            await app(scope, receive, send)

    return with_engine


@pytest.mark.filterwarnings("ignore")
def test_generated_requests_get_answers_as_documented(tmp_path):
    text = Tokenizer.from_folder(write_tiny_checkpoint(tmp_path))
    config = SchemathesisConfig.from_dict(
        {
            "seed": 1,
            "phases": {"stateful": {"enabled": False}},
            "generation": {"max-examples": 20, "database": "none"},
            "checks": {
                # The server may refuse a request that fits the schema, for example because the context is too short for the
                # prompt.
                "positive_data_acceptance": {"enabled": False},
                "negative_data_rejection": {"expected-statuses": [400, 404, 405, 413, 415]},
            },
        }
    )
    failures, num_cases, labels = [], 0, set()
    schema = schemathesis.openapi.from_asgi("/openapi.json", whole_app(text), config=config)
    for event in from_schema(schema).execute():
        if isinstance(event, events.NonFatalError | events.FatalError):
            failures.append(str(event))
        if not isinstance(event, events.ScenarioFinished):
            continue
        labels.add(event.label)
        for id, checks in event.recorder.checks.items():
            num_cases += 1
            failed = [check.failure_info.failure for check in checks if check.failure_info]
            case = event.recorder.cases[id].value
            failures += [f"{event.label}: {f.title}: {f.message[:500]} | {str(case.body)[:300]}" for f in failed]
    assert not failures, "\n".join(failures[:10])
    assert labels >= OPERATIONS
    assert num_cases > 500
