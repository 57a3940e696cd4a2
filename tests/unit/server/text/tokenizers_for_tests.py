"""Small tokenizers of each kind for tests. The functions train them, so nothing is downloaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache, partial
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from server.text.cuts import WORD_PATTERNS
from server.text.tokenizer import Tokenizer as ServerTokenizer
from tests.support.tiny_checkpoint import CORPUS, tiny_tokenizer

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
SPECIALS = ["<unk>", "<s>", "</s>"]
REPLACEMENT = "\ufffd"
GROWS = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
LLAMA2_DECODER = decoders.Sequence(
    [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
)
GEMMA_DECODER = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
METASPACE_DECODER = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
WORDS = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)


@cache
def byte_level() -> ServerTokenizer:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([AddedToken("été", normalized=False), AddedToken("日本 語", normalized=False)])
    return ServerTokenizer(tokenizer)


def by_pattern(*patterns: str, normalizer: Any = None, prefix_space: bool = False) -> ServerTokenizer:
    """Train a byte-level BPE that divides text into words by `patterns`, or by GPT-2's pattern if none is given."""
    tokenizer = Tokenizer(models.BPE())
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    level = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space, use_regex=not patterns)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    tokenizer.train_from_iterator([CORPUS, CORPUS.upper(), "日本語、中文。 " * 9], trainer)
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.add_special_tokens(["<|end|>", "<s>"])
    return ServerTokenizer(tokenizer)


def digits() -> ServerTokenizer:
    tokenizer = by_pattern()._tokenizer
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return ServerTokenizer(tokenizer)


def with_added(*tokens: AddedToken, normalizer: Any = None) -> ServerTokenizer:
    tokenizer = by_pattern(normalizer=normalizer)._tokenizer
    tokenizer.add_tokens(list(tokens))
    return ServerTokenizer(tokenizer)


def sentencepiece(
    decoder: Any, *, normalizer: Any = None, pre_tokenizer: Any = None, by_words: bool = True, post_processor: Any = None
) -> ServerTokenizer:
    """Train a BPE with byte fallback. With `by_words`, no token contains a space inside, as in published vocabularies."""
    trained = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=[*SPECIALS, *BYTES, REPLACEMENT], show_progress=False)
    if by_words:
        trained.pre_tokenizer = WORDS
    else:
        trained.normalizer = normalizers.Sequence(GROWS)
    trained.train_from_iterator(CORPUS.splitlines(), trainer)
    # The trainer marks the byte tokens as special. In published tokenizers they are ordinary, so the model is built again.
    vocab = trained.get_vocab(with_added_tokens=True)
    merges = [tuple(m) for m in json.loads(trained.to_str())["model"]["merges"]]
    plain = Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    for name, part in (("normalizer", normalizer), ("pre_tokenizer", pre_tokenizer), ("post_processor", post_processor)):
        if part is not None:
            setattr(plain, name, part)
    plain.add_special_tokens(SPECIALS)
    plain.decoder = decoder
    return ServerTokenizer(plain)


@cache
def llama2() -> ServerTokenizer:
    return sentencepiece(LLAMA2_DECODER, normalizer=normalizers.Sequence(GROWS), by_words=False)


@cache
def llama2_by_words() -> ServerTokenizer:
    begin = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return sentencepiece(LLAMA2_DECODER, normalizer=normalizers.Sequence(GROWS), post_processor=begin)


def llama2_with_a_word() -> ServerTokenizer:
    tokenizer = Tokenizer.from_str(llama2_by_words()._tokenizer.to_str())
    tokenizer.add_tokens([AddedToken("tide", normalized=False), AddedToken("Gate", normalized=False)])
    return ServerTokenizer(tokenizer)


def with_merge(tokenizer: ServerTokenizer, left: str, right: str) -> ServerTokenizer:
    """Return a copy of `tokenizer` with a token `left + right`, and with the merge of the two as the first of all merges."""
    spec = json.loads(tokenizer._tokenizer.to_str())
    spec["model"]["vocab"][left + right] = len(spec["model"]["vocab"])
    spec["model"]["merges"].insert(0, [left, right])
    return ServerTokenizer(Tokenizer.from_str(json.dumps(spec)))


@cache
def gemma() -> ServerTokenizer:
    split = pre_tokenizers.Split(" ", "merged_with_previous")
    return with_merge(sentencepiece(GEMMA_DECODER, normalizer=GROWS[1], pre_tokenizer=split), "▁", "▁")


@cache
def metaspace() -> ServerTokenizer:
    return sentencepiece(METASPACE_DECODER, normalizer=normalizers.Sequence(GROWS), by_words=False)


def metaspace_words(scheme: str, split: bool) -> ServerTokenizer:
    return sentencepiece(METASPACE_DECODER, pre_tokenizer=pre_tokenizers.Metaspace(prepend_scheme=scheme, split=split))


def unigram() -> ServerTokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = WORDS
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=300, unk_token="<unk>", special_tokens=["<unk>", "</s>"], show_progress=False)
    tokenizer.train_from_iterator(CORPUS.splitlines(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return ServerTokenizer(tokenizer)


@cache
def word_piece() -> ServerTokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=600, special_tokens=["[UNK]"], show_progress=False)
    tokenizer.train_from_iterator(CORPUS.splitlines(), trainer)
    return ServerTokenizer(tokenizer)


@cache
def no_decoder() -> ServerTokenizer:
    tokenizer = Tokenizer.from_str(word_piece()._tokenizer.to_str())
    tokenizer.decoder = None
    return ServerTokenizer(tokenizer)


ALL = {
    "byte_level": byte_level,
    "llama2": llama2,
    "llama2_by_words": llama2_by_words,
    "gemma": gemma,
    "metaspace": metaspace,
    "word_piece": word_piece,
    "no_decoder": no_decoder,
}

DEEPSEEK = [r"\p{N}{1,3}", "[一-龥぀-ゟ\u30a0-ヿ]+", next(pattern for pattern in WORD_PATTERNS if pattern.startswith("[!"))]
Make = Callable[[], ServerTokenizer]
CUT: dict[str, Make] = {
    **{f"words{i}": cache(partial(by_pattern, pattern)) for i, pattern in enumerate(sorted(WORD_PATTERNS))},
    "byte_level": byte_level,
    "gpt2": cache(by_pattern),
    "deepseek": cache(partial(by_pattern, *DEEPSEEK)),
    "digits": cache(digits),
    "nfc": cache(partial(by_pattern, normalizer=normalizers.NFC())),
    "nfkc": cache(partial(by_pattern, normalizer=normalizers.NFKC())),
    "prefix_space": cache(partial(by_pattern, prefix_space=True)),
    "takes_spaces": cache(
        partial(with_added, AddedToken("<mask>", lstrip=True, rstrip=True), AddedToken("<|end|>", rstrip=True, special=True))
    ),
    "added_words": cache(
        partial(with_added, AddedToken("a, b"), AddedToken("tide-gate"), AddedToken("  "), normalizer=normalizers.NFC())
    ),
    "llama2_by_words": llama2_by_words,
    "llama2_with_a_word": cache(llama2_with_a_word),
    "gemma": gemma,
    "unigram": cache(unigram),
    **{
        f"metaspace_{scheme}_{'split' if split else 'whole'}": cache(partial(metaspace_words, scheme, split))
        for scheme in ("always", "first", "never")
        for split in (True, False)
    },
}
"""Tokenizers for which safe cuts are known."""


def gemma_with_added(content: str) -> ServerTokenizer:
    tokenizer = Tokenizer.from_str(gemma()._tokenizer.to_str())
    tokenizer.add_tokens([AddedToken(content, normalized=True)])
    return ServerTokenizer(tokenizer)


RARELY_CUT: dict[str, Make] = {
    "a token over a space": cache(lambda: with_merge(gemma(), ",", "▁")),
    "an added token over a space": cache(partial(gemma_with_added, ".▁1")),
    "an added token with a space": cache(partial(gemma_with_added, "! a")),
}
"""Tokenizers that have no boundary before a space."""

NOT_CUT: dict[str, Make] = {
    "merges over spaces and commas": llama2,
    "unknown pre-tokenizer": word_piece,
    "unknown pattern": cache(partial(by_pattern, r"[^\r\n]+|\s+")),
    "unknown normalizer": cache(partial(by_pattern, normalizer=normalizers.Strip())),
    "whole words only": cache(partial(with_added, AddedToken("tide", single_word=True))),
}
"""Tokenizers for which no cut is known to be safe."""
