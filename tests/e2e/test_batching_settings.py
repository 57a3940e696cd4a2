"""Tests that the settings of the batch reach the engine of a real server, and that wrong ones stop the start."""

import pytest

from tests.support import plain_http
from tests.support.children import ServerChild, wait_until
from tests.support.serving import metrics, refused_start


def limits(server):
    found = metrics(server)
    names = ("sequences", "tokens", "chunk")
    return tuple(found.get(f"tidegate_engine_batch_{name}_limit", 0) for name in names)


def test_the_policy_and_its_bounds_are_in_force():
    with ServerChild(batching="aimd", min_batch=3, max_batch=5, max_num_seqs=8, max_step_tokens=64) as server:
        wait_until(lambda: any(limits(server)), "the engine has sent a heartbeat")
        seqs, tokens, _ = limits(server)
        assert 3 <= seqs <= 5
        assert tokens <= 64
    with ServerChild(batching="fixed", max_num_seqs=8, max_step_tokens=64) as server:
        wait_until(lambda: any(limits(server)), "the engine has sent a heartbeat")
        assert limits(server) == (8, 64, 64)


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"TIDEGATE_BATCHING": "model"}, "batching is model (from TIDEGATE_BATCHING)"),
        ({"TIDEGATE_MAX_BATCH": "2"}, "max_batch is 2 (from TIDEGATE_MAX_BATCH)"),
        ({"TIDEGATE_SLO_CLASS": "gold"}, "slo_class is 'gold' (from TIDEGATE_SLO_CLASS)"),
    ],
)
def test_a_wrong_setting_stops_the_start_with_its_name(variables, says):
    assert says in refused_start(variables).stderr


@pytest.mark.parametrize("setting", ["cost_file", "fake_cost_file"])
@pytest.mark.parametrize(
    ("content", "says"), [(None, "cannot be read"), ("", "not a complete JSON"), ('{"version": 7}', "version is 7")]
)
def test_a_cost_file_that_cannot_be_used_stops_the_start_before_the_engine(tmp_path, setting, content, says):
    path = tmp_path / "costs.json"
    if content is not None:
        path.write_text(content)
    stderr = refused_start({f"TIDEGATE_{setting.upper()}": str(path), "TIDEGATE_RUNNER": "fake"}).stderr
    assert says in stderr
    assert str(path) in stderr
    assert setting in stderr
    assert "batching." not in stderr
    assert "engine 0" not in stderr


def test_a_server_starts_from_what_the_one_before_learnt(tmp_path):
    settings = {"cost_folder": tmp_path / "learnt", "fake_step_ms": 1, "max_num_seqs": 8}

    def serve() -> ServerChild:
        with ServerChild(**settings) as server:
            for number in range(100):
                body = {"prompt_token_ids": [number % 50 + 10, 11, 12], "max_tokens": 3, "ignore_eos": True}
                assert plain_http.post(f"{server.url}/v1/generate", json=body, timeout=30).status_code == 200
        return server

    messages = [line["message"] for line in serve().lines]
    assert "learnt step costs read" not in messages
    (path,) = settings["cost_folder"].iterdir()
    assert "learnt step costs read" in [line["message"] for line in serve().lines]
    path.write_text(path.read_text()[:100])
    (ignored,) = [line for line in serve().lines if line["message"] == "learnt step costs are ignored"]
    assert str(path) in ignored["why"]


def test_a_folder_of_learnt_costs_that_cannot_be_made_stops_the_start(tmp_path):
    (tmp_path / "file").write_text("")
    stderr = refused_start({"TIDEGATE_COST_FOLDER": str(tmp_path / "file")}).stderr
    assert f"cost_folder is '{tmp_path / 'file'}', which is no folder and cannot be made" in stderr
