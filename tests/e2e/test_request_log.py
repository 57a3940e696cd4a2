"""Tests the log lines of requests of a whole server: one line for each request, HTTP and gRPC alike, with counts and times."""

import grpc

from server.rpc.pb.tidegate.v1 import inference_pb2 as pb
from server.rpc.pb.tidegate.v1 import inference_pb2_grpc
from tests.support import plain_http
from tests.support.children import wait_until

SECRET = "the secret tide"


def lines_of(server, id):
    return [line for line in server.lines if line.get("logger") == "tidegate.requests" and line["id"] == id]


def line_of(server, id):
    wait_until(lambda: lines_of(server, id), f"a log line of request {id}")
    (line,) = lines_of(server, id)
    assert SECRET not in str(line)
    return line


def test_a_request_has_one_line_with_its_counts_and_times(server):
    for stream in (False, True):
        body = {"prompt": SECRET, "max_tokens": 5, "ignore_eos": True, "stream": stream, "n": 2}
        answer = plain_http.post(f"{server.url}/v1/generate", json=body, headers={"x-request-id": f"http-{stream}"})
        assert answer.headers["x-request-id"] == f"http-{stream}"
        line = line_of(server, f"http-{stream}")
        assert (line["route"], line["status"], line["completion_tokens"]) == ("POST /v1/generate", 200, 10)
        assert line["prompt_tokens"] > 0
        assert 0 <= line["queue_ms"] <= line["ttft_ms"] <= line["total_ms"]
        assert line["answer"].startswith("gen-")


def test_a_refused_request_has_a_line_with_its_code(server):
    answer = plain_http.post(f"{server.url}/v1/completions", json={"prompt": SECRET, "max_tokens": 10**8})
    line = line_of(server, answer.headers["x-request-id"])
    assert (line["status"], line["code"]) == (400, "context_length_exceeded")


def test_a_grpc_call_has_a_line_like_an_http_request(server):
    with grpc.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        asked = pb.GenerateRequest(prompt=SECRET, max_tokens=5, ignore_eos=True)
        assert list(stub.Generate(asked, metadata=(("x-request-id", "grpc-1"),)))
    line = line_of(server, "grpc-1")
    assert (line["route"], line["status"], line["completion_tokens"]) == ("/tidegate.v1.Inference/Generate", "OK", 5)
    assert line["prompt_tokens"] > 0
    assert 0 <= line["queue_ms"] <= line["ttft_ms"] <= line["total_ms"]
