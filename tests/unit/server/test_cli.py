"""Tests the commands of `tidegate`: their flags, their help, and the arguments that they refuse."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import ClassVar

import pytest
from typer.testing import CliRunner

from engine.errors import ConfigError, TidegateError
from server import __main__ as entry
from server import __version__, cli
from server.bench import offline
from server.settings import Settings
from server.settings_sources import flag
from tests.support.children import ROOT, after
from tests.support.tiny_checkpoint import write_tiny_checkpoint


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for name in list(os.environ):
        if name.startswith("TIDEGATE_"):
            monkeypatch.delenv(name)


@pytest.fixture
def served(monkeypatch):
    """Return a list to which `serve` adds its settings instead of starting a server."""
    seen = []

    class Supervisor:
        @staticmethod
        def serve(settings):
            seen.append(settings)
            return 0

    monkeypatch.setattr(cli, "_load", lambda module: Supervisor)
    return seen


def test_every_setting_is_a_flag():
    shown = CliRunner().invoke(cli.app, ["serve", "--help"], env={"COLUMNS": "300"}).output
    assert not [name for name in Settings.model_fields if flag(name) not in shown]


def test_flags_become_settings(served):
    done = CliRunner().invoke(cli.app, ["serve", "--port", "0", "--no-prefix-caching", "--overlap", "--max-n", "3"])
    assert done.exit_code == 0, done.output
    assert (served[0].port, served[0].prefix_caching, served[0].overlap, served[0].max_n) == (0, False, True, 3)
    assert served[0].grpc_port == 9000


@pytest.mark.parametrize("command", ["serve", "doctor"])
def test_help_shows_defaults_and_allowed_values(command):
    shown = CliRunner().invoke(cli.app, [command, "--help"], env={"COLUMNS": "300"}).output
    assert "HTTP port; 0 means any free port (a whole number from 0 to 65535). [default: 8000]" in shown
    assert "Device of the engine (one of auto, cpu, cuda). [default: auto]" in shown
    assert "Reuse KV blocks for equal prompt prefixes. [default: true]" in shown
    defaults = [field.default for field in Settings.model_fields.values() if field.default is not None]
    assert shown.count("[default: ") == len(defaults)


def test_ctrl_c_ends_a_command_quietly(monkeypatch):
    class Interrupted:
        @staticmethod
        def serve(settings):
            raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_load", lambda module: Interrupted)
    done = CliRunner().invoke(cli.app, ["serve"])
    assert (done.exit_code, done.output) == (130, "")


def test_ctrl_c_during_the_imports_ends_quietly(monkeypatch):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "main", interrupted)
    with pytest.raises(SystemExit) as caught:
        entry.main()
    assert caught.value.code == 130


def run(*words, stdin=None, shell=":", **variables):
    command = after(shell, [sys.executable, "-m", "server", *words])
    environment = {**os.environ, **variables}
    done = subprocess.run(command, cwd=ROOT, env=environment, input=stdin, capture_output=True, check=False, timeout=120)
    return subprocess.CompletedProcess(command, done.returncode, done.stdout.decode(), done.stderr.decode())


def test_the_version_is_printed():
    done = run("--version")
    assert (done.returncode, done.stdout) == (0, f"tidegate {__version__}\n")


def test_the_package_has_its_version_from_the_source():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "version" not in project["project"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "server.__version__"}


class Engine:
    """Replaces LLM. It records the options that it is built with, and then raises TidegateError."""

    seen: ClassVar[list[dict]] = []

    def __init__(self, **options):
        self.seen.append(options)
        raise TidegateError("stop")


@pytest.fixture
def engine(monkeypatch, tmp_path):
    """Return a list to which `generate` and `bench offline` add the options of their engine. No engine is built."""
    monkeypatch.setenv("TIDEGATE_MODEL", str(write_tiny_checkpoint(tmp_path)))
    monkeypatch.setattr(offline, "LLM", Engine)
    monkeypatch.setattr("engine.llm.LLM", Engine)
    monkeypatch.setattr(Engine, "seen", [])
    return Engine.seen


@pytest.mark.parametrize("command", [["generate", "hello"], ["bench", "offline", "--workload", "single"]])
def test_commands_without_a_server_take_every_setting_too(engine, monkeypatch, tmp_path, command):
    (tmp_path / "tidegate.yaml").write_text("max_model_len: 9\nmax_queue: 7\ndtype: float16\n")
    monkeypatch.setenv("TIDEGATE_DTYPE", "bfloat16")
    monkeypatch.setenv("TIDEGATE_MAX_MODEL_LEN", "1500")
    monkeypatch.setenv("TIDEGATE_DEVICE", "cuda")
    CliRunner().invoke(cli.app, [*command, "--config", str(tmp_path / "tidegate.yaml"), "--device", "cpu"])
    (options,) = engine
    assert (options["device"], options["dtype"], options["max_model_len"]) == ("cpu", "bfloat16", 1500)
    assert options["scheduler"].max_queue == 7
    assert options["model"] == os.environ["TIDEGATE_MODEL"]
    assert options["cache"].prefix_caching == (command[0] == "generate")
    assert options["offline"]


@pytest.mark.parametrize("command", [["generate", "hello"], ["bench", "offline"]])
def test_commands_without_a_server_refuse_a_misspelt_variable(command, monkeypatch):
    monkeypatch.setenv("TIDEGATE_MODL", "x")
    with pytest.raises(ConfigError, match="did you mean 'model'"):
        CliRunner().invoke(cli.app, command, catch_exceptions=False)


@pytest.fixture
def measured(monkeypatch):
    """Return a list to which a command of `bench` adds the arguments of its run. Nothing is measured."""
    seen = []

    class Bench:
        @staticmethod
        def run(*args, **kwargs):
            seen.append((*args, kwargs))

    monkeypatch.setattr(cli, "_load", lambda module: Bench)
    return seen


def test_bench_offline_takes_several_models_and_workloads(measured, tmp_path):
    words = [
        "--model",
        "a",
        "--model",
        "b",
        "--workload",
        "single",
        "--workload",
        "prefill",
        "--rounds",
        "2",
        "--dtype",
        "float16",
    ]
    done = CliRunner().invoke(cli.app, ["bench", "offline", *words, "--record", str(tmp_path / "x")])
    assert done.exit_code == 0, done.output
    settings, workloads, options = measured[0]
    assert [(s.model, s.dtype) for s in settings] == [("a", "float16"), ("b", "float16")]
    assert list(workloads) == ["single", "prefill"]
    assert options == {"rounds": 2, "record": tmp_path / "x"}


def test_bench_offline_without_a_model_takes_that_of_the_settings(measured, monkeypatch):
    monkeypatch.setenv("TIDEGATE_MODEL", "named")
    CliRunner().invoke(cli.app, ["bench", "offline"])
    settings, workloads, options = measured[0]
    assert ([s.model for s in settings], list(workloads), options) == (["named"], [], {"rounds": 3, "record": None})


def test_bench_kernels_takes_names(measured):
    CliRunner().invoke(cli.app, ["bench", "kernels", "--kernel", "linear", "--kernel", "gated"])
    assert measured == [(["linear", "gated"], {"record": None})]


def test_bench_plan_takes_several_cost_files(measured, tmp_path):
    words = "--costs a --costs b --rate 50 --shape rag --ttft-ms 900 --gap-ms 40 --share 0.95 --prefix 7 --seconds 9"
    done = CliRunner().invoke(
        cli.app,
        ["bench", "plan", *words.split(), "--kv-tokens", "5", "--trace", "t", "--cv", "2", "--record", str(tmp_path / "x")],
    )
    assert done.exit_code == 0, done.output
    given = {"rate": 50, "shape": "rag", "ttft_ms": 900, "gap_ms": 40, "share": 0.95, "prefix": 7, "seconds": 9, "kv_tokens": [5]}
    given |= {"trace": Path("t"), "cv": 2, "record": tmp_path / "x"}
    assert measured == [([Path("a"), Path("b")], given)]


def test_bench_plan_has_the_targets_of_the_class_interactive(measured):
    CliRunner().invoke(cli.app, ["bench", "plan", "--costs", "a", "--rate", "5"])
    _, options = measured[0]
    assert (options["ttft_ms"], options["gap_ms"], options["share"], options["kv_tokens"]) == (500, 50, 0.99, ())


def test_bench_cost_takes_a_file_and_the_sizes_of_steps(measured, tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "_keep_kernels", lambda: None)
    words = ["--model", "m", "--max-num-seqs", "8", "--max-step-tokens", "64", "--rounds", "3", "--out", "costs.json"]
    done = CliRunner().invoke(cli.app, ["bench", "cost", *words, "--record", str(tmp_path / "x")])
    assert done.exit_code == 0, done.output
    settings, options = measured[0]
    assert (settings.model, settings.max_num_seqs, settings.max_step_tokens) == ("m", 8, 64)
    assert options == {"out": Path("costs.json"), "rounds": 3, "record": tmp_path / "x"}


def test_a_prompt_that_is_not_utf_8_is_refused_with_one_message():
    done = run("generate", "-", stdin=b"caf\xe9")
    assert done.returncode == 1
    assert done.stderr == "tidegate: standard input is not UTF-8 text: unexpected end of data at byte 3\n"


def test_errors_name_settings_instead_of_fields_of_the_engine(monkeypatch, capsys):
    def refuse():
        raise ConfigError("scheduler.max_skips is -1: it must be at least 0")

    monkeypatch.setattr(cli, "app", refuse)
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 2
    assert capsys.readouterr().err == "tidegate: max_skips is -1: it must be at least 0\n"


def test_a_wrong_setting_is_one_message_and_exit_code_2():
    done = run("serve", "--port", "many")
    assert done.returncode == 2
    assert done.stderr == "tidegate: port is 'many' (from --port): it must be a whole number from 0 to 65535\n"


@pytest.mark.torch
def test_doctor_names_what_is_missing():
    done = run("doctor", "--model", "/nowhere", "--port", "0", "--grpc-port", "0")
    assert done.returncode == 1
    assert "MISSING model: /nowhere: no such folder" in done.stdout
    assert "\nok torch: " in done.stdout


@pytest.mark.torch
def test_doctor_finds_nothing_missing_for_the_bundled_model():
    done = run("doctor", "--port", "0", "--grpc-port", "0")
    assert done.returncode == 0, done.stdout
    assert "MISSING" not in done.stdout


@pytest.mark.torch
def test_generate_prints_nothing_but_the_text():
    done = run("generate", "hello", "--max-tokens", "8", "--temperature", "0")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert run("generate", "hello", "--max-tokens", "8", "--temperature", "0").stdout == done.stdout


def test_generate_takes_the_models_own_defaults_and_end_tokens(monkeypatch, tmp_path):
    seen = []

    class Listening(Engine):
        def __init__(self, **options):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def stream(self, ids, params):
            seen.append(params)
            return []

    monkeypatch.setattr("engine.llm.LLM", Listening)
    monkeypatch.setenv("TIDEGATE_MODEL", str(write_tiny_checkpoint(tmp_path)))
    path = tmp_path / "generation_config.json"
    path.write_text('{"temperature": 0.25, "top_k": 7, "max_new_tokens": 9, "suppress_tokens": [5]}')
    for flags in ([], ["--temperature", "0.5", "--max-tokens", "3"], ["--generation-config", "off"]):
        assert CliRunner().invoke(cli.app, ["generate", "hello", *flags]).exit_code == 0
    assert [(p.temperature, p.top_k, p.max_tokens, p.bad_words) for p in seen] == [
        (0.25, 7, 9, ((5,),)),
        (0.5, 7, 3, ((5,),)),
        (1.0, 0, 128, ()),
    ]
    assert {p.end_token_ids for p in seen} == {(1,)}


def test_generate_refuses_a_value_out_of_range():
    done = run("generate", "hello", "--temperature", "-1")
    assert done.returncode == 1
    assert done.stderr == "tidegate: temperature is -1.0: it must lie between 0.0 and 100.0\n"


def test_without_a_folder_to_write_to_generate_ends_with_one_message():
    done = run("generate", "hello", shell="ulimit -f 0", HOME=os.devnull, XDG_CACHE_HOME="")
    assert done.returncode == 2
    assert "there is no folder for compiled kernels" in done.stderr
    assert "Traceback" not in done.stderr
