"""Tests a real `tidegate serve` whose folder for temporary files is on a full disk."""

import json
import urllib.request

from tests.support.children import ServerChild
from tests.support.small_disk import fill, small_disk


def generate(server):
    body = json.dumps({"prompt": "a", "max_tokens": 4}).encode()
    request = urllib.request.Request(server.url + "/v1/generate", body, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=10) as answer:
        return json.load(answer)["usage"]["completion_tokens"]


def metrics(server):
    with urllib.request.urlopen(server.url + "/metrics", timeout=10) as answer:
        return answer.read().decode()


def test_a_full_temporary_folder_ends_no_worker_and_the_log_names_it(tmp_path):
    server = ServerChild()
    with small_disk(tmp_path / "small") as folder:
        fill(folder, leave=16 << 10)  # if no page is free, Python chooses another temporary folder
        server._environment["TMPDIR"] = str(folder)
        with server:
            workers = server.children()
            assert [generate(server) for _ in range(3)] == [4, 4, 4]
            assert server.children() == workers
            assert 'tidegate_requests_finished_total{reason="length",transport="http"} 3.0' in metrics(server)
            (line,) = [line for line in server.lines if line.get("logger") == "tidegate.metrics"]
    assert str(folder) in line["message"]
    assert "set TMPDIR" in line["message"]


def test_a_temporary_folder_that_fills_up_while_serving_ends_no_worker(tmp_path):
    server = ServerChild(api_workers=2)
    with small_disk(tmp_path / "small") as folder:
        server._environment["TMPDIR"] = str(folder)
        with server:
            workers = server.children()
            assert generate(server) == 4
            fill(folder)
            assert [generate(server) for _ in range(20)] == [4] * 20
            assert server.children() == workers
            assert 'tidegate_requests_finished_total{reason="length",transport="http"} 21.0' in metrics(server)
