"""Tests the settings: which source of a value has precedence, and which values are refused."""

import os
import re

import msgspec
import pytest
from pydantic import ValidationError

from engine.config import EngineConfig
from engine.errors import ConfigError
from server.settings import Settings
from server.settings_sources import describe, in_settings_names, load_settings

HALF_OPEN = "a number greater than 0 and at most 1"


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for name in list(os.environ):
        if name.startswith("TIDEGATE_"):
            monkeypatch.delenv(name)


@pytest.fixture
def yaml_file(tmp_path):
    def write(text):
        path = tmp_path / "tidegate.yaml"
        path.write_text(text)
        return path

    return write


def test_flags_override_the_environment_which_overrides_the_file_and_the_defaults(monkeypatch, yaml_file):
    path = yaml_file("port: 1\ngrpc_port: 2\nmax_n: 3\n")
    monkeypatch.setenv("TIDEGATE_PORT", "11")
    monkeypatch.setenv("TIDEGATE_GRPC_PORT", "12")
    settings = load_settings({"port": "21"}, config=path)
    assert (settings.port, settings.grpc_port, settings.max_n, settings.api_workers) == (21, 12, 3, 1)


def test_the_file_can_be_named_in_the_environment(monkeypatch, yaml_file):
    monkeypatch.setenv("TIDEGATE_CONFIG", str(yaml_file("port: 77\n")))
    assert load_settings().port == 77


def test_an_empty_variable_counts_as_unset(monkeypatch):
    monkeypatch.setenv("TIDEGATE_MODEL", "")
    monkeypatch.setenv("TIDEGATE_PORT", "")
    assert (load_settings().model, load_settings().port) == (None, 8000)


@pytest.mark.parametrize("text", ["", "# nothing\n", "{}\n"])
def test_a_file_without_settings_leaves_the_defaults(yaml_file, text):
    assert load_settings(config=yaml_file(text)) == Settings()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"port": "x"}, "port is 'x' (from --port): it must be a whole number from 0 to 65535"),
        ({"port": "65536"}, "port is '65536' (from --port): it must be a whole number from 0 to 65535"),
        ({"port": "80.5"}, "port is '80.5' (from --port): it must be a whole number from 0 to 65535"),
        (
            {"header_timeout_s": "nan"},
            "header_timeout_s is 'nan' (from --header-timeout-s): it must be a number greater than 0 and at most 1e+06",
        ),
        ({"memory_fraction": 1.5}, "memory_fraction is 1.5 (from --memory-fraction): it must be " + HALF_OPEN),
        ({"device": "tpu"}, "device is 'tpu' (from --device): it must be one of auto, cpu, cuda"),
        ({"overlap": "maybe"}, "overlap is 'maybe' (from --overlap): it must be true or false"),
        ({"max_queue": 0}, "max_queue is 0 (from --max-queue): it must be a whole number from 1 to 16777216"),
        ({"batching": "dynamic"}, "batching is 'dynamic' (from --batching): it must be one of auto, model, aimd, fixed"),
        (
            {"step_low_ms": "0"},
            "step_low_ms is '0' (from --step-low-ms): it must be a number greater than 0 and at most 1e+06",
        ),
        ({"slo_class": "gold"}, "slo_class is 'gold' (from --slo-class): it must be one of interactive, standard, batch"),
        (
            {"priority_ceiling": "-1001"},
            "priority_ceiling is '-1001' (from --priority-ceiling): it must be a whole number from -1000 to 1000",
        ),
        ({"model": ""}, "model is '' (from --model): it must be a text that is not empty"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_reported_with_its_source_and_the_values_allowed(flags, message):
    with pytest.raises(ConfigError) as caught:
        load_settings(flags)
    assert caught.value.message == message
    assert caught.value.param == next(iter(flags))


def test_each_source_is_named_in_errors(monkeypatch, yaml_file):
    path = yaml_file("max_n: many\napi-workers: 2\nport: yes\n")
    monkeypatch.setenv("TIDEGATE_GRPC_PORT", "-1")
    with pytest.raises(ConfigError) as caught:
        load_settings(config=path)
    lines = caught.value.message.splitlines()
    assert f"max_n is 'many' (from {path}): it must be a whole number from 1 to 128" in lines
    assert f"port is True (from {path}): it must be a whole number from 0 to 65535" in lines
    assert f"api-workers is set in {path}, but there is no such setting: did you mean 'api_workers'?" in lines
    assert "grpc_port is '-1' (from TIDEGATE_GRPC_PORT): it must be a whole number from 0 to 65535" in lines
    assert len(lines) == 4


def test_an_unknown_variable_is_refused(monkeypatch):
    monkeypatch.setenv("TIDEGATE_PROT", "1")
    with pytest.raises(ConfigError, match=r"TIDEGATE_PROT is set in the environment, .* did you mean 'port'"):
        load_settings()


def test_a_variable_set_by_kubernetes_is_refused_with_an_explanation(monkeypatch):
    monkeypatch.setenv("TIDEGATE_PORT", "tcp://10.0.0.1:8000")
    with pytest.raises(ConfigError, match="enableServiceLinks: false"):
        load_settings()


@pytest.mark.parametrize("text", ["- 1\n", "port\n", "a: [\n"], ids=["list", "word", "broken"])
def test_a_file_that_is_not_a_mapping_is_refused(yaml_file, text):
    with pytest.raises(ConfigError):
        load_settings(config=yaml_file(text))


def test_a_file_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        load_settings(config=tmp_path / "none.yaml")


def test_settings_are_frozen_and_survive_json(monkeypatch):
    settings = load_settings({"model": "/m", "num_blocks": 7, "max_step_tokens": "999", "overlap": True})
    with pytest.raises(ValidationError):
        settings.port = 1
    monkeypatch.setenv("TIDEGATE_PORT", "5")
    assert Settings.model_validate_json(settings.model_dump_json()) == settings


def test_the_defaults_of_settings_are_those_of_the_engine():
    assert load_settings({"model": "/m"}).engine_config() == EngineConfig(model="/m")


def test_every_setting_of_the_engine_reaches_it():
    given = {"model": "/m", "device": "cpu", "dtype": "float32", "load_format": "dummy", "runner": "fake", "max_model_len": 9}
    given |= {"seed": 1, "overlap": False, "debug_checks": True, "block_size": 2, "num_blocks": 3, "memory_fraction": 0.4}
    given |= {"host_bytes": 5, "prefix_caching": False, "max_num_seqs": 6, "max_step_tokens": 7, "max_queue": 8, "max_skips": 10}
    given |= {"max_queue_tokens": 14, "min_batch": 15, "max_batch": 16, "step_low_ms": 17.0, "step_high_ms": 18.0}
    given |= {"cost_file": "/c", "cost_folder": "/d", "host_tier_bytes": 21}
    given |= {"disk_tier_folder": "/k", "disk_tier_bytes": 22, "disk_tier_write_rate": 23.0, "disk_tier_key_file": "/l"}
    fake = {"fake_step_ms": 11.0, "fake_token_us": 12.0, "fake_num_blocks": 13, "fake_nan_token": 14, "fake_cost_file": "/f"}
    fake |= {"fake_block_bytes": 19, "fake_host_gb_s": 20.0, "fake_failing_moves": 0.5}
    config = load_settings({**given, **fake, "batching": "aimd"}).engine_config()
    parts = (config, config.cache, config.scheduler, config.batching)
    assert all(any(getattr(part, name, None) == value for part in parts) for name, value in given.items())
    assert config.batching.policy == "aimd"
    assert {f"fake_{name}": value for name, value in msgspec.structs.asdict(config.fake).items()} == fake


def test_an_engine_config_needs_a_model():
    with pytest.raises(ConfigError, match="model is not set"):
        load_settings().engine_config()


def test_every_setting_has_a_description_and_describes_its_values():
    for name, field in Settings.model_fields.items():
        assert describe(name)
        assert field.description


@pytest.mark.parametrize(("one", "other"), [("port", "grpc_port"), ("port", "admin_port"), ("grpc_port", "admin_port")])
def test_no_two_ports_may_be_equal(one, other):
    with pytest.raises(ConfigError, match=rf"^{one} and {other} are both 9100: each needs a port of its own$") as caught:
        load_settings({one: "9100", other: "9100"})
    assert caught.value.param == other
    assert load_settings({one: "0", other: "0"}).port in (0, 8000)


def test_a_step_must_have_a_token_for_every_running_request():
    with pytest.raises(ConfigError) as caught:
        load_settings({"max_step_tokens": "100"})
    wanted = "max_step_tokens is 100 (from --max-step-tokens): it must be at least max_num_seqs, which is 256"
    assert caught.value.message == wanted


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"max_batch": "3"}, "max_batch is 3 (from --max-batch): it must be at least min_batch, which is 4"),
        ({"min_batch": "65"}, "max_batch is 64 (from the defaults): it must be at least min_batch, which is 65"),
        (
            {"step_high_ms": "30"},
            "step_high_ms is 30.0 (from --step-high-ms): it must be more than step_low_ms, which is 30.0",
        ),
        (
            {"batching": "model"},
            "batching is model (from --batching): it must be auto, aimd or fixed, unless cost_file names a file from which times "
            "of steps are predicted",
        ),
    ],
)
def test_settings_of_the_batch_that_contradict_each_other_are_refused(flags, message):
    with pytest.raises(ConfigError) as caught:
        load_settings(flags)
    assert caught.value.message == message
    assert load_settings({"max_batch": "4", "step_high_ms": "30.5"}).step_low_ms == 30.0
    assert load_settings({"batching": "model", "cost_file": "/costs.json"}).batching == "model"


def test_an_empty_yaml_value_is_reported_as_empty(yaml_file):
    path = yaml_file("device:\n")
    with pytest.raises(ConfigError) as caught:
        load_settings(config=path)
    assert caught.value.message == f"device is empty (from {path}): it must be one of auto, cpu, cuda"


def test_names_of_engine_fields_are_replaced_by_names_of_settings():
    message = (
        "cache.host_bytes leaves 5 bytes, fake.num_blocks too: scheduler.max_queue is 1, and so is cache.json or prefix_caching; "
        "batching.policy is 'model', scheduler.max_queue_tokens 2, batching.step_low_ms 3"
    )
    assert in_settings_names(message) == (
        "host_bytes leaves 5 bytes, fake_num_blocks too: max_queue is 1, and so is cache.json or prefix_caching; "
        "batching is 'model', max_queue_tokens 2, step_low_ms 3"
    )


def test_a_list_is_a_text_with_commas_or_a_list_of_yaml(monkeypatch, yaml_file):
    wanted = ("https://chat.example", "http://localhost:3000")
    assert load_settings({"cors_origins": "https://chat.example, http://localhost:3000"}).cors_origins == wanted
    monkeypatch.setenv("TIDEGATE_CORS_ORIGINS", ",".join(wanted))
    assert load_settings().cors_origins == wanted
    monkeypatch.delenv("TIDEGATE_CORS_ORIGINS")
    settings = load_settings(
        config=yaml_file("cors_origins: [https://chat.example, http://localhost:3000]\nallowed_hosts: a.example")
    )
    assert (settings.cors_origins, settings.allowed_hosts) == (wanted, ("a.example",))
    assert Settings.model_validate_json(settings.model_dump_json()) == settings
    assert load_settings().cors_origins == ()


@pytest.mark.parametrize(
    ("given", "sent"),
    [
        ("https://Chat.Example", "https://chat.example"),
        ("HTTPS://chat.example:443", "https://chat.example"),
        ("http://chat.example:80", "http://chat.example"),
        ("http://chat.example:443", "http://chat.example:443"),
        ("http://[::1]:80", "http://[::1]"),
        ("app://chat:80", "app://chat:80"),
    ],
)
def test_an_origin_is_compared_as_browsers_write_it(given, sent):
    assert load_settings({"cors_origins": given}).cors_origins == (sent,)


@pytest.mark.parametrize(
    ("name", "value", "right"),
    [
        ("cors_origins", "https://chat.example/", "an origin such as https://chat.example"),
        ("cors_origins", "chat.example", "an origin such as https://chat.example"),
        ("cors_origins", "https://chat.example?x", "an origin such as https://chat.example"),
        ("cors_origins", "https://me@chat.example", "an origin such as https://chat.example"),
        ("cors_origins", "https://bücher.example", "an origin such as https://chat.example"),
        ("cors_origins", "https://*.example", "an origin such as https://chat.example"),
        ("allowed_hosts", "https://chat.example", "a host name such as chat.example"),
        ("allowed_hosts", "chat.example:80", "a host name such as chat.example"),
    ],
)
def test_an_entry_of_a_list_that_could_never_match_is_refused(name, value, right):
    with pytest.raises(ConfigError, match=f"^{name} is '{re.escape(value)}' .*: it must be {right}"):
        load_settings({name: f"*,{value}" if name == "cors_origins" else value})


@pytest.mark.parametrize("name", ["start_timeout_s", "stall_timeout_s", "worker_stall_timeout_s"])
def test_a_timeout_shorter_than_the_reports_it_waits_for_is_refused(name):
    with pytest.raises(ConfigError, match=f"{name} is '0.5' .*: it must be a number from 1 to 1000000"):
        load_settings({name: "0.5"})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((field, "1e300") for field in Settings.model_fields if field.endswith("_timeout_s")),
        ("idle_timeout_s", "5000000"),
        ("fake_step_ms", "1e308"),
        ("max_num_seqs", "9223372036854775808"),
        ("fake_num_blocks", "99999999999999999999"),
        ("block_size", "1e30"),
    ],
)
def test_a_value_that_no_process_could_work_with_is_refused_by_name(name, value):
    """gRPC takes durations up to 2^31 milliseconds, and lists of rows and blocks must fit into memory."""
    with pytest.raises(ConfigError, match=rf"^{name} ") as caught:
        load_settings({name: value})
    assert caught.value.param == name


@pytest.mark.parametrize(("text", "value"), [("off", "off"), ("false", "off"), ('"off"', "off"), ("auto", "auto")])
def test_generation_config_can_be_switched_off_in_yaml(yaml_file, text, value):
    """YAML reads `off` as false."""
    assert load_settings(config=yaml_file(f"generation_config: {text}\n")).generation_config == value


@pytest.mark.parametrize("text", ["on", "true", "vllm", "0"])
def test_another_value_of_generation_config_is_refused(yaml_file, text):
    with pytest.raises(ConfigError, match=r"generation_config is .*: it must be one of auto, off"):
        load_settings(config=yaml_file(f"generation_config: {text}\n"))
