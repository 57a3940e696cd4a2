"""The model's tokenizer: byte-level BPE for Python and English, trained on a sample of the corpus; every text comes back unchanged.

What a token may span is the pattern's choice, and it is made for code:

    "\\n        "         a line end with the indent after it, so that a new line costs one token however deep it is
    " return" ".append"  a word or a part of an identifier with one character before it: a space, a dot, a bracket
    " ):" " == "         marks with one space before them
    "2" "026"            up to three digits

The first five ids are those of the special tokens; the chat template knows the roles system, user and assistant. Encoding puts
<|begin|> first, as serving does. Nothing of the held-out text is seen here except to report bytes per token.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import typer
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from engine.errors import ConfigError
from train import shards
from train.corpus import HELDOUT, SEED, SHARDS
from train.fetch import WORK, Work

VOCAB = 8192  # special tokens and the 256 bytes included
SPECIAL_TOKENS = ("<|begin|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>")  # ids 0 to 4
BEGIN, END = 0, 1
MAX_CONTEXT = 2048  # tokens
SAMPLE_BYTES = 70_000_000  # of training text: merges change little past it
MAX_TOKEN = 32  # characters: no token for a whole ruler of dashes
PATTERN = "|".join(
    (
        r"(?:\r?\n)+[ \t]*",  # line ends and the next line's indent
        r"[^\r\n\p{L}\p{M}\p{N}_]?[\p{L}\p{M}_]+",  # a word with what stands before it
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{M}\p{N}_]+",  # marks
        r"[^\S\r\n]+(?!\S)",  # spaces, but for the one that the next word or mark takes
        r"\s+",
    )
)
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('the model knows the roles system, user and assistant') }}"
    "{% endif %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def train_tokenizer(texts: Iterable[str], vocab: int = VOCAB) -> Tokenizer:
    """A tokenizer of `vocab` tokens, or ConfigError where `texts` are too few to make so many."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        max_token_length=MAX_TOKEN,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != vocab:
        raise ConfigError(f"the text gave {tokenizer.get_vocab_size()} tokens, and {vocab} are needed: train on more of it")
    begin = SPECIAL_TOKENS[BEGIN]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A", pair=f"{begin} $A $B", special_tokens=[(begin, BEGIN)]
    )
    return tokenizer


def config() -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIAL_TOKENS[BEGIN],
        "eos_token": SPECIAL_TOKENS[END],
        "add_bos_token": True,
        "clean_up_tokenization_spaces": False,
        "model_max_length": MAX_CONTEXT,
        "chat_template": CHAT_TEMPLATE,
    }


def sample(corpus: Path, size: int) -> Iterator[str]:
    """About `size` bytes of the training text: each document with the same chance, the same ones every time."""
    paths = [corpus / f"train-{index:02d}.jsonl.xz" for index in range(SHARDS)]
    absent = [path.name for path in paths if not path.is_file()]
    if absent:
        raise ConfigError(f"{corpus} has no {', '.join(absent)}: run `python -m train.corpus`")
    total = json.loads((corpus / "manifest.json").read_text("utf-8"))["train"]["bytes"]
    chance = random.Random(SEED)
    for path in paths:
        for row in shards.read(path):
            if chance.random() * total < size:
                yield row["text"]


def bytes_per_token(tokenizer: Tokenizer, texts: Iterable[str]) -> float:
    """Without <|begin|>; raises ConfigError for a text that does not come back byte for byte."""
    size = tokens = 0
    for text in texts:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        if tokenizer.decode(ids, skip_special_tokens=False) != text:
            raise ConfigError(f"the tokenizer does not give back the text that begins {text[:60]!r}: its pattern or decoder is wrong")
        size += len(text.encode())
        tokens += len(ids)
    return size / max(1, tokens)


def main(work: Work = WORK) -> None:
    """Train the tokenizer on a sample of the corpus."""
    try:
        tokenizer = train_tokenizer(sample(work / "corpus", SAMPLE_BYTES))
        found = bytes_per_token(tokenizer, (row["text"] for row in shards.read(HELDOUT)))
    except ConfigError as e:
        raise SystemExit(f"train.tokenizer: {e.message}") from e
    folder = work / "tokenizer"
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config(), indent=2) + "\n", "utf-8")
    typer.echo(f"{folder}: {VOCAB} tokens, {found:.3f} bytes per token on the held-out text")


if __name__ == "__main__":
    typer.run(main)
