"""Tests the evaluation on tiny checkpoints, whose figures are known or are computed a second time by slower code."""

import json
import lzma
import math
import shutil
import subprocess
from io import StringIO

import msgspec
import pytest
import torch
import typer
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from safetensors.torch import load_file, save_file

from engine import LLM
from engine.errors import ConfigError
from tests.support.children import ServerChild
from tests.support.tiny_checkpoint import CONFIG, write_tiny_checkpoint
from train import acceptance, scoring
from train.evaluate import Asked, Report, evaluate, main

VOCAB, LAYERS = CONFIG["vocab_size"], CONFIG["num_hidden_layers"]
TEXTS = [
    "The tide comes in, and the river waits behind the gate. " * 6,
    "def gate(level):\n    return level > 0.5  # naïve — \u00fc\u4e2d\n" * 4,
    "x",
]
torch.set_num_threads(1)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return write_tiny_checkpoint(tmp_path_factory.mktemp("plain"))


def variant(plain, folder, change, **config):
    """Copy the tiny checkpoint in `plain` to `folder`. The function `change` edits its tensors, and `config` changes its
    config."""
    shutil.copytree(plain, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIG | config))
    return folder


def add_mtp(tensors):
    """Add an MTP module to `tensors`. Its decoder layer is a copy of the model's last layer."""
    last, prefix = f"model.layers.{LAYERS - 1}.", f"model.layers.{LAYERS}."
    tensors.update({prefix + n.removeprefix(last): t.clone() for n, t in list(tensors.items()) if n.startswith(last)})
    hidden = CONFIG["hidden_size"]
    tensors.update({f"{prefix}{n}.weight": torch.ones(hidden) for n in ("enorm", "hnorm", "shared_head.norm")})
    tensors[f"{prefix}eh_proj.weight"] = torch.randn(hidden, 2 * hidden, generator=torch.Generator().manual_seed(1)) * 0.1


@pytest.fixture(scope="module")
def with_mtp(plain, tmp_path_factory):
    return variant(plain, tmp_path_factory.mktemp("mtp") / "mtp", add_mtp, num_nextn_predict_layers=1)


@pytest.fixture(scope="module")
def uniform(plain, tmp_path_factory):
    def change(tensors):
        add_mtp(tensors)
        tensors["lm_head.weight"].zero_()

    return variant(plain, tmp_path_factory.mktemp("uniform") / "uniform", change, num_nextn_predict_layers=1)


def write_heldout(path, texts):
    with lzma.open(path, "wt", encoding="utf-8") as out:
        for i, text in enumerate(texts):
            out.write(json.dumps({"source": "ours", "licence": "Apache-2.0", "path": f"{i}.txt", "text": text}) + "\n")
    return path


@pytest.fixture(scope="module")
def heldout(tmp_path_factory):
    return write_heldout(tmp_path_factory.mktemp("heldout") / "heldout.jsonl.xz", TEXTS)


def asked(model, heldout, **more):
    return Asked(
        **({"dtype": "auto", "context": None, "max_bytes": None, "draft": None, "num_prompts": 3} | more),
        model=str(model),
        heldout=heldout,
    )


def run(model, heldout, **more) -> Report:
    return evaluate(asked(model, heldout, **more), Console(file=StringIO()))


# --- Held-out text is cut into windows.


@given(num=st.integers(0, 400), size=st.integers(2, 70))
def test_windows_score_each_token_but_the_first_once(num, size):
    spans = scoring.windows(num, size)
    scored = [i for s in spans for i in range(s.scored, s.end)]
    assert scored == list(range(1, num))
    for span in spans:
        assert 0 <= span.start < span.scored < span.end <= num
        assert span.end - span.start <= size
        assert span.scored - span.start in (1, size // 2)
    assert not spans or spans[0].start == 0


def test_a_window_of_one_token_is_refused():
    with pytest.raises(ConfigError, match="context is 1"):
        scoring.windows(5, 1)


def test_documents_are_cut_at_max_bytes_between_characters(heldout):
    whole = scoring.read_documents(heldout)
    assert [d.text for d in whole] == TEXTS
    first = len(TEXTS[0])
    assert [d.text for d in scoring.read_documents(heldout, first)] == TEXTS[:1]
    at = TEXTS[1].encode().index("ï".encode()) + 1  # cuts the two bytes of "ï" in half
    cut = scoring.read_documents(heldout, first + at)
    assert cut[1].text == TEXTS[1][: TEXTS[1].index("ï")]


@pytest.mark.parametrize("content", ["", "no json\n", '{"path": "a"}\n', "[1]\n", '{"path": "a", "text": ""}\n'])
def test_a_heldout_file_of_another_form_is_named(tmp_path, content):
    path = tmp_path / "odd.jsonl.xz"
    path.write_bytes(lzma.compress(content.encode()))
    with pytest.raises(ConfigError, match=r"odd\.jsonl\.xz"):
        scoring.read_documents(path)


def test_a_heldout_file_that_is_missing_cut_or_no_xz_is_named(tmp_path, heldout):
    for content in (b"plain", heldout.read_bytes()[:-20]):
        path = tmp_path / "bad.xz"
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=r"bad\.xz"):
            scoring.read_documents(path)
    with pytest.raises(ConfigError, match="gone"):
        scoring.read_documents(tmp_path / "gone")


# --- Scores equal those that are known or computed otherwise.


@pytest.mark.parametrize("context", [None, 16])
def test_a_uniform_model_needs_log2_of_its_vocabulary_for_each_token(uniform, heldout, context):
    report = run(uniform, heldout, context=context)
    num_bytes = sum(len(text.encode()) for text in TEXTS)
    with LLM(uniform) as llm:
        tokens = sum(len(llm.tokenizer.encode(text).ids) - 1 for text in TEXTS)
    assert (report.tokens, report.heldout_bytes) == (tokens, num_bytes)
    assert report.bits_per_byte == pytest.approx(math.log2(VOCAB) * tokens / num_bytes, abs=1e-5)
    assert report.top1 == 1.0  # all tokens are equally probable, so each one counts as the argmax


@torch.inference_mode()
def test_scores_are_those_of_a_dense_pass_over_each_window(plain, heldout):
    size = 24
    own = acceptance.TeacherForced(plain, dtype=torch.float32, device=torch.device("cpu"))
    with LLM(plain) as llm:
        scorer = scoring.EngineScorer(llm)
        files = [scorer.encode(text) for text in TEXTS]
        found = scoring.score(scorer, files, size)
    logprob, first, tokens = 0.0, 0, 0
    for ids in files:
        for span in scoring.windows(len(ids), size):
            piece = torch.tensor(ids[span.start : span.end])
            said = own._model.logits(own._run(piece)).log_softmax(-1)
            for i in range(span.scored - span.start, len(piece)):
                logprob += float(said[i - 1, piece[i]])
                first += int(said[i - 1].argmax() == piece[i])
                tokens += 1
    assert (found.tokens, found.first) == (tokens, first)
    assert found.logprob == pytest.approx(logprob, rel=1e-5)


def test_xz_is_what_the_xz_command_writes(uniform, heldout, tmp_path):
    raw = "".join(TEXTS).encode()
    assert run(uniform, heldout).xz_bits_per_byte == pytest.approx(8 * scoring.xz_size(raw) / len(raw), abs=1e-5)
    if (xz := shutil.which("xz")) is not None:
        written = subprocess.run([xz, "-9e", "--stdout"], input=raw, capture_output=True, check=True).stdout
        assert len(written) == scoring.xz_size(raw)


# --- The MTP module and the draft model predict tokens.


@torch.inference_mode()
def test_mtp_acceptance_is_that_of_asking_again_at_every_token(with_mtp, heldout):
    own = acceptance.TeacherForced(with_mtp, dtype=torch.float32, device=torch.device("cpu"))
    with LLM(with_mtp) as llm:
        files = [llm.tokenizer.encode(text).ids for text in TEXTS]
        continued = acceptance.continue_greedily(llm, acceptance.choose_prompts(files, 4), num_tokens=10)
    right = total = 0
    for c in continued:
        for known in range(c.num_prompt + 1, len(c.ids)):  # number of known tokens; the next one is predicted
            ids = torch.tensor(c.ids[:known])
            out = own._run_mtp(own.mtp, own._run(ids), ids)
            right += int(own.mtp.logits(out[-1:]).argmax() == c.ids[known])
            total += 1
    assert total >= 20
    assert own.mtp_acceptance(continued) == right / total


def test_a_constant_model_is_always_predicted(uniform, heldout):
    """All logits of this model are equal, so the model and its MTP module both choose token 0."""
    assert run(uniform, heldout).mtp_acceptance == 1.0


def test_a_model_is_its_own_best_draft(plain, uniform, heldout):
    assert run(plain, heldout, draft=str(plain)).draft_acceptance == 1.0
    assert run(plain, heldout, draft=str(uniform)).draft_acceptance == 1.0  # in the uniform draft, every token has rank 1


def test_prompts_are_spread_over_the_files_and_the_same_every_time():
    files = [[n] * 1000 for n in range(10)] + [[99]]
    prompts = acceptance.choose_prompts(files, 20)
    assert prompts == acceptance.choose_prompts(files, 20)
    assert [p[0] for p in prompts] == [n for n in range(10) for _ in range(2)]
    low, high = acceptance.PROMPT_TOKENS
    assert all(low <= len(p) <= high for p in prompts)
    assert acceptance.choose_prompts([[1]], 5) == []


def test_a_draft_of_another_vocabulary_is_refused(plain, heldout, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(plain, other)
    (other / "config.json").write_text(json.dumps(CONFIG | {"vocab_size": 100}))
    with pytest.raises(ConfigError, match=r"has 100 tokens .* has 512"):
        run(plain, heldout, draft=str(other))


# --- The load of the experts is measured.


def test_load_of_experts_that_a_bias_chooses(plain, tmp_path, heldout):
    """The test gives four of the sixteen experts a bias larger than any score, so all tokens go to these four. They are in two
    groups."""
    chosen = [0, 1, 4, 5]

    def change(tensors):
        add_mtp(tensors)
        for name, tensor in tensors.items():
            if name.endswith("e_score_correction_bias"):
                tensor.zero_()[chosen] = 10.0

    report = run(variant(plain, tmp_path / "biased", change, num_nextn_predict_layers=1), heldout)
    assert report.expert_layers == [1, 2, 3, 4]
    assert report.expert_max_over_mean == [4.0] * 4
    assert report.expert_max_over_mean_max == 4.0
    assert report.expert_utilisation == 0.25


def test_nothing_is_left_in_the_model(with_mtp):
    own = acceptance.TeacherForced(with_mtp, dtype=torch.float32, device=torch.device("cpu"))
    balance = own.expert_balance([[1, 2, 3, 4], [5, 6]])
    assert all(1.0 <= ratio <= 16 / 4 for ratio in balance.max_over_mean)
    assert not any(module._forward_pre_hooks for part in (own._model, own.mtp) for module in part.modules())


# --- The report is printed as a table and as JSON.


def test_the_last_line_has_every_key(with_mtp, heldout, capsys):
    main(str(with_mtp), heldout, "float32", None, None, None, 3)
    said = capsys.readouterr()
    line = json.loads(said.out.splitlines()[-1])
    assert list(line) == list(Report.__struct_fields__)
    assert line["model"] == "mtp"
    assert (line["precision"], line["compute"]) == ("float32", "float32")
    assert 0 <= line["mtp_acceptance"] <= 1
    assert line["mtp_reason"] is None
    assert line["heldout_files"] == 3
    assert line["xz_bits_per_byte"] < line["xz_per_file_bits_per_byte"]
    assert len(line["expert_max_over_mean"]) == LAYERS
    assert "bits per byte" in said.err


def test_without_an_mtp_module_the_reason_is_given(plain, uniform, heldout, tmp_path):
    report = run(plain, heldout)
    assert report.mtp_acceptance is None
    assert "config.json" in report.mtp_reason
    promised = variant(plain, tmp_path / "promised", lambda _: None, num_nextn_predict_layers=1)
    assert "no tensor" in run(promised, heldout).mtp_reason


@pytest.mark.parametrize(
    ("wrong", "words"),
    [({"model": "/no/such/folder"}, "/no/such/folder"), ({"dtype": "int4"}, "int4"), ({"context": 1}, "context is 1")],
)
def test_what_is_asked_wrongly_is_named(plain, heldout, capsys, wrong, words):
    given = {"model": str(plain), "dtype": "auto", "context": None} | wrong
    with pytest.raises(typer.Exit) as ended:
        main(given["model"], heldout, given["dtype"], given["context"], None, None, 3)
    assert ended.value.exit_code == 1
    assert words in capsys.readouterr().err


# --- A server is evaluated over HTTP.


@pytest.fixture(scope="module")
def server(with_mtp):
    with ServerChild(runner="torch", model=with_mtp) as child:
        yield child


def test_a_server_scores_as_the_engine_does(server, with_mtp, heldout):
    by_server, by_engine = run(server.url, heldout, context=32), run(with_mtp, heldout, context=32)
    assert by_server.model == "mtp"
    assert by_server.tokens == by_engine.tokens
    assert by_server.bits_per_byte == pytest.approx(by_engine.bits_per_byte, abs=2e-5)
    assert by_server.top1 == by_engine.top1
    same = ("xz_bits_per_byte", "heldout_sha256", "heldout_bytes", "context")
    assert all(getattr(by_server, name) == getattr(by_engine, name) for name in same)
    assert by_server.mtp_acceptance is None
    assert "server" in by_server.mtp_reason
    unknown = ("precision", "compute", "device", "expert_layers", "expert_max_over_mean", "draft_acceptance")
    assert all(getattr(by_server, name) is None for name in unknown)
    assert msgspec.json.decode(msgspec.json.encode(by_server), type=Report) == by_server


def test_what_a_server_refuses_is_told(server):
    scorer = scoring.ServerScorer(server.url + "/")
    with pytest.raises(scoring.ServerFailure, match=r"/v1/generate answered 400: .*token id 100000"):
        list(scorer.positions([[100000]], lambda _: None))


def test_nobody_at_the_address(heldout):
    with pytest.raises(scoring.ServerFailure, match="address of a Tidegate server"):
        run("http://127.0.0.1:1", heldout)


def test_a_draft_beside_a_server_is_refused(server, plain, heldout):
    with pytest.raises(ConfigError, match="draft"):
        run(server.url, heldout, draft=str(plain))
