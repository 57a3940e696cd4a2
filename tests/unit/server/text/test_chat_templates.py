"""Tests where a model folder may have its chat templates and its special tokens, against what transformers finds there."""

import json
import shutil

import pytest

from engine.errors import InvalidRequest, UnsupportedField
from server.bundled import FOLDER
from server.text.conversation import Conversation
from server.text.tokenizer import Tokenizer

HEAD, TAIL = "{{ bos_token }}{% for m in messages %}{{ '<|' + m.role + '|>' }}", "{{ m.content }}{% endfor %}"
MESSAGES = [{"role": "user", "content": "a"}]
BROKEN = "{% for m in messages %}\n{% nonsense %}"


@pytest.fixture
def folder(tmp_path):
    """Make a folder with the bundled model's tokenizer.json and no other file. `write` adds files."""
    shutil.copy(FOLDER / "tokenizer.json", tmp_path)
    return tmp_path


def write(folder, files):
    tokens = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|begin|>", "eos_token": "<|end|>"}
    config = files.get("tokenizer_config.json", {})
    for name, content in {**files, "tokenizer_config.json": {**tokens, **config}}.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))


def ours(folder, name=None):
    return Tokenizer.from_folder(folder).chat.find(name, "tiny").render(Conversation(messages=MESSAGES))


def theirs(folder, name=None):
    from transformers import PreTrainedTokenizerFast  # it takes seconds to import

    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    return tokenizer.apply_chat_template(MESSAGES, chat_template=name, tokenize=False, add_generation_prompt=True)


def source(mark):
    return HEAD + mark + TAIL


NAMED = [{"name": "default", "template": source("d")}, {"name": "rag", "template": source("r")}]
FORMS = {
    "a string": {"tokenizer_config.json": {"chat_template": source("s")}},
    "a list": {"tokenizer_config.json": {"chat_template": NAMED}},
    "a list with a name twice": {
        "tokenizer_config.json": {"chat_template": [*NAMED, {"name": "default", "template": source("2")}]}
    },
    "an object": {"tokenizer_config.json": {"chat_template": {"default": source("d"), "rag": source("r")}}},
    "a file": {"chat_template.jinja": source("f")},
    "a file and a config": {"chat_template.jinja": source("f"), "tokenizer_config.json": {"chat_template": NAMED}},
    "several files": {"chat_template.jinja": source("f"), "additional_chat_templates/rag.jinja": source("x")},
    "a default among the additional files": {"additional_chat_templates/default.jinja": source("x")},
    "an empty template": {"tokenizer_config.json": {"chat_template": ""}},
    "a file that is in use by name only": {"tokenizer_config.json": {"chat_template": NAMED}, "other.jinja": source("o")},
}


@pytest.mark.parametrize("files", FORMS.values(), ids=FORMS)
def test_the_default_template_is_the_one_that_transformers_takes(folder, files):
    write(folder, files)
    assert ours(folder) == theirs(folder)
    chat = Tokenizer.from_folder(folder).chat
    assert chat.problems == []
    assert chat.default is chat.find(None, "tiny") is chat.find("default", "tiny")


@pytest.mark.parametrize("form", ["a list", "an object", "several files"])
def test_a_template_can_be_asked_for_by_name(folder, form):
    write(folder, FORMS[form])
    assert ours(folder, "rag") == theirs(folder, "rag") != ours(folder)
    assert ours(folder, "default") == theirs(folder, "default") == ours(folder)


@pytest.mark.parametrize("file", ["chat_template.json", "processor_config.json"])
def test_a_folder_of_a_model_that_also_takes_images_has_its_template_in_a_file_of_its_processor(folder, file):
    write(folder, {file: {"chat_template": source("p")}})
    assert ours(folder) == "<|begin|><|user|>pa"
    write(folder, {file: {"chat_template": source("p")}, "tokenizer_config.json": {"chat_template": source("t")}})
    assert ours(folder) == "<|begin|><|user|>ta"


NODEFAULT = {
    "a list": {"tokenizer_config.json": {"chat_template": NAMED[1:]}},
    "additional files": {"additional_chat_templates/rag.jinja": source("r"), "tokenizer_config.json": {"chat_template": NAMED}},
}


@pytest.mark.parametrize("files", NODEFAULT.values(), ids=NODEFAULT)
def test_named_templates_without_a_default_are_reported(folder, files):
    write(folder, files)
    with pytest.raises(ValueError, match="no default"):
        theirs(folder)
    with pytest.raises(InvalidRequest, match=r"none of them is the default: give chat_template, one of rag") as caught:
        ours(folder)
    assert caught.value.param == "chat_template"
    assert ours(folder, "rag") == theirs(folder, "rag")
    chat = Tokenizer.from_folder(folder).chat
    assert chat.default is None
    assert chat.problems == ["none of the named chat templates (rag) is called 'default'"]


FAULTY = {
    "a tag": ({"tokenizer_config.json": {"chat_template": BROKEN}}, "tokenizer_config.json: .* line 2: encountered unknown tag"),
    "a file": ({"chat_template.jinja": BROKEN}, "chat_template.jinja: .* line 2: "),
    "a number": ({"tokenizer_config.json": {"chat_template": 7}}, "tokenizer_config.json: chat_template must be"),
    "an entry": ({"tokenizer_config.json": {"chat_template": [{"name": "default"}]}}, ".*'default' must be a string"),
    "a list of strings": ({"tokenizer_config.json": {"chat_template": ["x"]}}, "tokenizer_config.json: chat_template must be"),
    "a file of the processor": (
        {"chat_template.json": "{\n  x"},
        "chat_template.json cannot be read: it is not JSON, at line 2, column 3$",
    ),
    "deep JSON": ({"chat_template.json": "[" * 100_000}, "chat_template.json cannot be read: it is nested too deeply$"),
    "digits": ({"chat_template.json": "1" * 5000}, "chat_template.json cannot be read: a number has too many digits$"),
}


@pytest.mark.parametrize(("files", "reason"), FAULTY.values(), ids=FAULTY)
def test_a_template_that_cannot_be_used_costs_chat_only(folder, files, reason):
    write(folder, files)
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.encode("a")
    with pytest.raises(InvalidRequest, match=rf"^tiny cannot answer messages: {reason}") as caught:
        ours(folder)
    assert caught.value.param == "messages"
    assert str(folder) not in caught.value.message
    [problem] = tokenizer.chat.problems
    assert problem in caught.value.message


def test_a_file_that_is_no_text_costs_chat_only(folder):
    write(folder, {})
    (folder / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(
        InvalidRequest, match=r"chat_template\.jinja: the chat template cannot be read: it is not UTF-8, at byte 0$"
    ):
        ours(folder)


def test_a_broken_named_template_costs_that_name_only(folder):
    write(folder, {"tokenizer_config.json": {"chat_template": {"default": source("d"), "rag": BROKEN}}})
    assert ours(folder) == "<|begin|><|user|>da"
    with pytest.raises(InvalidRequest, match="does not parse") as caught:
        ours(folder, "rag")
    assert caught.value.param == "chat_template"


def test_a_model_without_a_template_says_so(folder):
    write(folder, {})
    assert Tokenizer.from_folder(folder).chat.problems == ["the model has no chat template"]
    with pytest.raises(InvalidRequest, match="no chat template, so it cannot answer messages: use /v1/completions"):
        ours(folder)


@pytest.mark.parametrize(("name", "error"), [("other", InvalidRequest), ("{{ 7 * 7 }}", UnsupportedField), ("", InvalidRequest)])
def test_a_template_is_never_taken_from_a_client(folder, name, error):
    write(folder, FORMS["a list"])
    with pytest.raises(error, match="one of default, rag") as caught:
        ours(folder, name)
    assert caught.value.param == "chat_template"


# --- special tokens

SHOW = "".join(
    f"{{{{ {name} }}}}," for name in ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "image_token", "eoi")
)
ADDED = {
    "__type": "AddedToken",
    "content": "<|user|>",
    "lstrip": False,
    "normalized": False,
    "rstrip": False,
    "single_word": False,
}
DECODER = {"added_tokens_decoder": {"0": {"content": "<|begin|>", "special": True}}}
MAP = "special_tokens_map.json"
TOKENS = {
    "a string": {"tokenizer_config.json": {"unk_token": "<|end|>"}},
    "an object": {"tokenizer_config.json": {"bos_token": ADDED, "unk_token": ADDED}},
    "a token of the model's own": {"tokenizer_config.json": {"image_token": "<|user|>"}},
    "named extra tokens": {"tokenizer_config.json": {"extra_special_tokens": {"eoi": "<|user|>", "image_token": "<|end|>"}}},
    "named additional tokens": {"tokenizer_config.json": {"additional_special_tokens": {"eoi": "<|user|>"}}},
    "tokens of the model's own in an object": {"tokenizer_config.json": {"model_specific_special_tokens": {"eoi": "<|user|>"}}},
    "unnamed extra tokens": {"tokenizer_config.json": {"extra_special_tokens": ["<|user|>"]}},
    "the map alone": {"tokenizer_config.json": {"bos_token": None}, MAP: {"bos_token": "<|user|>", "pad_token": "<|end|>"}},
    "objects in the map": {MAP: {"bos_token": {k: ADDED[k] for k in ADDED if k != "__type"}, "sep_token": "<|end|>"}},
    "the map against the config": {MAP: {"bos_token": "<|user|>", "image_token": "<|user|>"}},
    "null in the map": {MAP: {"bos_token": None}},
    "named tokens in the map": {MAP: {"extra_special_tokens": {"eoi": "<|user|>"}}},
    "the map against a config with added tokens": {"tokenizer_config.json": DECODER, MAP: {"bos_token": "<|user|>"}},
    "null against the map": {"tokenizer_config.json": {**DECODER, "bos_token": None}, MAP: {"bos_token": "<|user|>"}},
}


@pytest.mark.parametrize("files", TOKENS.values(), ids=TOKENS)
def test_special_tokens_have_the_names_that_transformers_gives_them(folder, files):
    write(folder, {**files, "chat_template.jinja": SHOW})
    assert ours(folder) == theirs(folder)


def test_padding_in_the_tokenizers_file_names_the_pad_token(folder):
    parts = json.loads((folder / "tokenizer.json").read_text())
    parts["padding"] = {
        "strategy": "BatchLongest",
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 1,
        "pad_type_id": 0,
    }
    parts["padding"]["pad_token"] = "<|end|>"
    (folder / "tokenizer.json").write_text(json.dumps(parts))
    write(folder, {"chat_template.jinja": SHOW})
    assert ours(folder) == theirs(folder) == "<|begin|>,<|end|>,,<|end|>,,,,"


def test_the_map_names_tokens_that_a_config_with_added_tokens_leaves_out(folder):
    """transformers does not read the map then. A token that a folder names is still that token."""
    write(folder, {"tokenizer_config.json": DECODER, MAP: {"sep_token": "<|user|>"}, "chat_template.jinja": SHOW})
    assert ours(folder) == "<|begin|>,<|end|>,,,<|user|>,,,"
