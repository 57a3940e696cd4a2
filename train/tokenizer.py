"""Trains Tidepool's tokenizer: `python -m train.tokenizer` learns a byte-level BPE from a sample of the training text.

The tokenizer's pieces suit code: a line end and the indentation after it are one piece, a word may carry one sign or space before
it (" if", ".append", "_name", "(self"), and numbers are split every three digits. Every text survives encoding and decoding byte
for byte.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated

import typer
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from train import shards
from train.shapes import BEGIN, CONTEXT, END, VOCAB_SIZE

SPECIAL_TOKENS = ("<|begin|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>")  # ids 0 to 4
SAMPLE_BYTES = 60_000_000
SEED = 2026
PIECES = (
    r"\s*[\r\n]+[ \t]*"  # line ends, and the next line's indentation
    r"|[^\r\n\p{L}\p{N}]?\p{L}+"  # a word, with one sign or space before it
    r"|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+"  # a run of signs, with at most one space before it
    r"|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('this model knows the roles system, user and assistant') }}"
    "{% endif %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def learn(texts: Iterable[str], *, vocab_size: int = VOCAB_SIZE) -> Tokenizer:
    """Learn a tokenizer of `vocab_size` tokens from `texts`, or of fewer if there is too little text. The tokenizer puts
    <|begin|> before a prompt."""
    tokenizer = Tokenizer(models.BPE())
    cut = pre_tokenizers.Split(Regex(PIECES), behavior="isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([cut, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(texts, trainer)
    begin = SPECIAL_TOKENS[BEGIN]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A", pair=f"{begin} $A $B", special_tokens=[(begin, BEGIN)]
    )
    return tokenizer


def sample(files: list[Path], num_bytes: int) -> Iterator[str]:
    """Sample about `num_bytes` of text, the same share of each shard's documents."""
    rng = random.Random(SEED)
    for file in files:
        texts = [row["text"] for row in shards.read(file)]
        rng.shuffle(texts)
        left = num_bytes // len(files)
        for text in texts:
            if left <= 0:
                break
            left -= len(text.encode())
            yield text


def write(tokenizer: Tokenizer, folder: Path) -> None:
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIAL_TOKENS[BEGIN],
        "eos_token": SPECIAL_TOKENS[END],
        "add_bos_token": True,
        "clean_up_tokenization_spaces": False,
        "model_max_length": CONTEXT,
        "chat_template": CHAT_TEMPLATE,
    }
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def main(work: Annotated[Path, typer.Option(help="Folder of the corpus.")] = Path(".cache/train")) -> None:
    """Learn the tokenizer from the corpus and write it to WORK/tokenizer."""
    files = shards.training_files(work / "corpus")
    tokenizer = learn(sample(files, SAMPLE_BYTES))
    if tokenizer.get_vocab_size() != VOCAB_SIZE:
        raise SystemExit(f"the text taught {tokenizer.get_vocab_size()} tokens instead of {VOCAB_SIZE}: more of it is needed")
    write(tokenizer, work / "tokenizer")


if __name__ == "__main__":
    typer.run(main)
