"""Tests what clients see of the chat templates of a model folder: prompts, refusals, and a folder whose template is broken."""

import json
import shutil

import pytest

from server.bundled import FOLDER
from server.text.tokenizer import Tokenizer
from tests.support import plain_http
from tests.support.children import ServerChild
from tests.support.http_api import MODEL, http_api
from tests.support.tiny_checkpoint import write_tiny_checkpoint

HEAD = "{{bos_token}}{% for m in messages %}{{'<|'+m.role+'|>'}}"
TAIL = "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
BODY = "{{m.content}}"
PARTS = "{% for p in m.content %}{% if p.type=='text' %}{{p.text}}{% endif %}{% endfor %}"
BROKEN = "{% for m in messages %}{% nonsense %}{% endfor %}"
USER = {"role": "user", "content": "a"}


@pytest.fixture
def folder(tmp_path):
    """Make a folder with the bundled model's tokenizer, for `change` to change."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(FOLDER / name, tmp_path)
    return tmp_path


def change(folder, template, **fields):
    path = folder / "tokenizer_config.json"
    config = {**json.loads(path.read_text()), "chat_template": template, **fields}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


async def rendered(folder, *messages, **fields):
    """Return the text of the tokens of POST /tokenize, special tokens included, and their number."""
    text = Tokenizer.from_folder(folder)
    async with http_api(text) as api:
        answer = await api.http.post("/tokenize", json={"messages": messages or [USER], **fields})
    assert answer.status_code == 200, answer.text
    return "".join(text.token_text(token) for token in answer.json()["tokens"]), answer.json()["count"]


async def refusal(folder, path, body):
    async with http_api(Tokenizer.from_folder(folder)) as api:
        answer = await api.http.post(path, json=body)
    assert 400 <= answer.status_code < 500
    return answer.json()["error"]


async def test_the_generation_tag_of_training_renders_its_body(folder):
    tag = "{% if m.role=='assistant' %}{% generation %}{{m.content}}{% endgeneration %}{% else %}{{m.content}}{% endif %}"
    change(folder, HEAD + tag + TAIL)
    text, _ = await rendered(folder, USER, {"role": "assistant", "content": "b"}, USER)
    assert text == "<|begin|><|user|>a<|assistant|>b<|user|>a<|assistant|>"


async def test_a_template_that_loops_over_parts_is_given_them(folder):
    change(folder, HEAD + PARTS + TAIL)
    part = {"type": "text", "text": "a much longer message, with many words"}
    text, count = await rendered(folder, {"role": "user", "content": [part]})
    assert text == "<|begin|><|user|>a much longer message, with many words<|assistant|>"
    assert count == 11
    assert await rendered(folder, {"role": "user", "content": part["text"]}) == (text, 11)


async def test_tools_and_documents_are_none_when_absent(folder):
    change(
        folder, HEAD + "{% if tools is not none %}[T]{% endif %}{% if documents is not none %}[D]{% endif %}{{m.content}}" + TAIL
    )
    assert await rendered(folder) == ("<|begin|><|user|>a<|assistant|>", 4)


async def test_special_tokens_may_be_named_in_special_tokens_map_alone(folder):
    change(folder, HEAD + BODY + TAIL, bos_token=None, eos_token=None)
    (folder / "special_tokens_map.json").write_text(json.dumps({"bos_token": "<|begin|>", "eos_token": "<|end|>"}))
    assert await rendered(folder) == ("<|begin|><|user|>a<|assistant|>", 4)


NAMED = {"default": HEAD + BODY + TAIL, "rag": HEAD + "[R]" + BODY + TAIL}


@pytest.mark.parametrize("template", [NAMED, [{"name": name, "template": source} for name, source in NAMED.items()]])
async def test_named_templates_are_chosen_by_name(folder, template):
    change(folder, template)
    assert (await rendered(folder))[0] == "<|begin|><|user|>a<|assistant|>"
    assert (await rendered(folder, chat_template="rag"))[0] == "<|begin|><|user|>[R]a<|assistant|>"
    error = await refusal(folder, "/tokenize", {"messages": [USER], "chat_template": "{{ messages }}"})
    assert (error["code"], error["param"]) == ("unsupported_field", "chat_template")


async def test_a_developer_is_a_system_for_a_template_that_does_not_know_developers(folder):
    change(folder, HEAD + "{% if m.role in ['system', 'user'] %}" + BODY + "{% endif %}{% endfor %}")
    assert (await rendered(folder, {"role": "developer", "content": "b"}, USER))[0] == "<|begin|><|system|>b<|user|>a"


async def test_parts_are_joined_by_a_newline_for_a_template_that_takes_strings(folder):
    change(folder, HEAD + BODY + TAIL)
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    assert (await rendered(folder, {"role": "user", "content": parts}))[0] == "<|begin|><|user|>one\ntwo<|assistant|>"


async def test_what_a_client_asks_of_the_template_reaches_it(folder):
    switch = "{% if add_generation_prompt and enable_thinking is false %}[off]{% endif %}"
    change(folder, HEAD + BODY + TAIL + switch)
    start = {"role": "assistant", "content": "The "}
    assert (await rendered(folder, chat_template_kwargs={"enable_thinking": False}))[0].endswith("<|assistant|>[off]")
    assert (await rendered(folder, add_generation_prompt=False))[0] == "<|begin|><|user|>a"
    assert (await rendered(folder, USER, start, continue_final_message=True))[0] == "<|begin|><|user|>a<|assistant|>The "
    assert (await rendered(folder, add_special_tokens=True))[0] == "<|begin|><|begin|><|user|>a<|assistant|>"


async def test_a_conversation_can_be_fed_back_with_the_openai_client(tmp_path):
    text = Tokenizer.from_folder(write_tiny_checkpoint(tmp_path))
    async with http_api(text) as api:
        messages = [USER]
        for dump in (
            lambda message: message,
            lambda message: message.model_dump(),
            lambda message: {**message.model_dump(), "content": None},
        ):
            answer = await api.openai.chat.completions.create(model=MODEL, messages=messages, max_tokens=3, seed=1)
            messages = [*messages, dump(answer.choices[0].message), USER]
        continued = await api.openai.chat.completions.create(
            model=MODEL,
            messages=[USER, {"role": "assistant", "content": "The "}],
            max_tokens=3,
            extra_body={"continue_final_message": True, "chat_template_kwargs": {"enable_thinking": False}},
        )
        assert continued.usage.completion_tokens <= 3


def test_a_template_that_does_not_parse_costs_chat_only(tmp_path):
    folder = write_tiny_checkpoint(tmp_path)
    change(folder, None)
    (folder / "chat_template.jinja").write_text(BROKEN)
    with (
        ServerChild(model=folder, served_model_name="tiny", api_workers=2) as server,
        plain_http.Client(base_url=server.url) as client,
    ):
        assert client.post("/v1/completions", json={"model": "tiny", "prompt": "x", "max_tokens": 1}).status_code == 200
        assert client.post("/tokenize", json={"prompt": "x"}).status_code == 200
        for path in ("/v1/chat/completions", "/tokenize"):
            answer = client.post(path, json={"model": "tiny", "messages": [USER]})
            error = answer.json()["error"]
            assert (answer.status_code, error["param"]) == (400, "messages")
            assert error["message"].startswith(
                "tiny cannot answer messages: chat_template.jinja: the chat template does not parse: line 1"
            )
            assert str(folder) not in error["message"]
        [said] = server.said("chat is not available, or not with every template")
    assert "chat_template.jinja: the chat template does not parse: line 1" in said["reason"]
