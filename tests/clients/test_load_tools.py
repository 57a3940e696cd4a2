"""Tests that the load generators guidellm and aiperf run against a server with its URL and model, and no flag beyond those that
describe the load. Both find the tokenizer by the model's name. Both count failed requests, and end with success all the same.

Each runs with its default route, which is chat, and with completions.
"""

import json

import pytest

from tests.clients import install
from tests.clients.cases import MODEL

REQUESTS, OUTPUT_TOKENS = 6, 8


@pytest.mark.environment("guidellm")
@pytest.mark.parametrize("route", ["", ",request_format=/v1/completions"], ids=["chat", "completions"])
def test_guidellm_measures_every_request(server, execute, tmp_path, route):
    report = tmp_path / "report.json"
    options = {
        "backend": f"kind=openai_http,target={server.url},model={MODEL}{route}",
        "profile": "kind=concurrent,streams=2",
        "constraint": f"kind=max_requests,count={REQUESTS}",
        "data": f"kind=synthetic_text,prompt_tokens=32,output_tokens={OUTPUT_TOKENS}",
        "output": f"kind=json,path={report}",
    }
    command = [str(install.program("guidellm", "guidellm")), "run", "--disable-progress"]
    execute(
        [*command, *(part for name, value in options.items() for part in (f"--{name}", value))],
        HF_HOME=str(tmp_path),
        HF_HUB_OFFLINE="1",
    )
    (benchmark,) = json.loads(report.read_text())["benchmarks"]
    assert not benchmark["requests"]["errored"], benchmark["requests"]["errored"][0]["info"]["error"]
    assert benchmark["metrics"]["request_totals"] == {"successful": REQUESTS, "errored": 0, "incomplete": 0, "total": REQUESTS}
    for request in benchmark["requests"]["successful"]:
        assert request["output_metrics"]["text_tokens"] == OUTPUT_TOKENS
        assert request["info"]["timings"]["token_iterations"] > 1


@pytest.mark.environment("aiperf")
@pytest.mark.parametrize("route", [(), ("--endpoint-type", "completions")], ids=["chat", "completions"])
def test_aiperf_measures_every_request(server, execute, tmp_path, route):
    command = [str(install.program("aiperf", "aiperf")), "profile", "--url", server.url, "--model", MODEL]
    load = [*route, "--streaming", "--concurrency", "2", "--request-count", str(REQUESTS)]
    lengths = ["--synthetic-input-tokens-mean", "32", "--output-tokens-mean", str(OUTPUT_TOKENS)]
    # aiperf takes the name of a folder for that of a repository if HF_HUB_OFFLINE is set.
    execute([*command, *load, *lengths, "--ui", "none", "--artifact-dir", str(tmp_path)], HF_HOME=str(tmp_path / "cache"))
    (report,) = tmp_path.rglob("profile_export_aiperf.json")
    measured = json.loads(report.read_text())
    assert measured["request_count"]["avg"] == REQUESTS
    assert not measured.get("error_summary")
    assert 1 < measured["output_sequence_length"]["avg"] <= OUTPUT_TOKENS
    assert measured["time_to_first_token"]["avg"] > 0
    assert measured["inter_token_latency"]["avg"] > 0
