"""Tests which tokens end a turn: those that the tokenizer's files name, and the one that the chat template writes."""

import json

import pytest

from server.text.chat import ChatTemplate
from server.text.end_tokens import template_end
from server.text.tokenizer import Tokenizer
from tests.support.tiny_checkpoint import write_tiny_checkpoint

SPECIAL = {
    token: id
    for id, token in enumerate(
        ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|eot|>", "<|start_header_id|>", "<|end_header_id|>",
         "<start_of_turn>", "<end_of_turn>", "<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>", "<|return|>", "[INST]"]
    )
}  # fmt: skip
CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>"
    "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
GEMMA = (
    "{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content }}<end_of_turn>\n"
    "{% endfor %}"
)
MISTRAL = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }}{% else %} {{ m.content }}</s>{% endif %}{% endfor %}"
)
PHI = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}<|endoftext|>"
GLM = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
ALWAYS_PROMPTS = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}<|assistant|>"
ONLY_AT_THE_END = "{% for m in messages %}{{ m.content }}{% endfor %}</s>"
LAST_IS_SPECIAL = "{% for m in messages %}{{ m.content }}{{ '<|return|>' if loop.last else '<|end|>' }}{% endfor %}"
AFTER_TEXT = "{% for m in messages %}{{ m.content }} (end)<|im_end|>{% endfor %}"
REFUSES = "{{ raise_exception('system first') }}"
DROPS_ANSWERS = "{% for m in messages if m.role == 'user' %}{{ m.content }}<|im_end|>{% endfor %}"


@pytest.mark.parametrize(
    ("template", "token"),
    [
        (CHATML, "<|im_end|>"),
        (LLAMA3, "<|eot_id|>"),
        (GEMMA, "<end_of_turn>"),
        (MISTRAL, "</s>"),
        (PHI, "<|end|>"),
        ("{% for m in messages %}{{ m.content }}<|eot_id|>{% endfor %}", "<|eot_id|>"),  # not <|eot|>, which it begins like
        (GLM, None),
        (ALWAYS_PROMPTS, None),
        (ONLY_AT_THE_END, None),
        (LAST_IS_SPECIAL, None),
        (AFTER_TEXT, None),
        (REFUSES, None),
        (DROPS_ANSWERS, None),
        ("{{ messages[0].content }}", None),
    ],
)
def test_the_token_that_a_template_writes_after_every_answer(template, token):
    assert template_end(ChatTemplate(template, {"bos_token": "<s>"}), SPECIAL) == (None if token is None else SPECIAL[token])


@pytest.fixture
def folder(tmp_path):
    return write_tiny_checkpoint(tmp_path)


def change(path, **fields):
    found = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(found | fields))


def end_tokens(folder, template="{{ messages[0].content }}", **files):
    change(folder / "tokenizer_config.json", eos_token=None, chat_template=template)
    for name, eos in files.items():
        change(folder / f"{name}.json", eos_token=eos)
    return Tokenizer.from_folder(folder).end_tokens


@pytest.mark.parametrize("name", ["tokenizer_config", "special_tokens_map"])
@pytest.mark.parametrize("eos", ["<|system|>", {"content": "<|system|>", "lstrip": False}])
def test_the_tokenizers_files_name_the_end_token(folder, name, eos):
    assert end_tokens(folder, **{name: eos}) == {2: f"{name}.json"}


def test_every_source_counts(folder):
    found = end_tokens(
        folder,
        "{% for m in messages %}{{ m.content }}<|user|>{% endfor %}",
        tokenizer_config="<|system|>",
        special_tokens_map="<|end|>",
    )
    assert found == {2: "tokenizer_config.json", 1: "special_tokens_map.json", 3: "chat template"}


def test_an_end_token_outside_the_vocabulary_is_none(folder):
    assert end_tokens(folder, tokenizer_config="<|nowhere|>") == {}
