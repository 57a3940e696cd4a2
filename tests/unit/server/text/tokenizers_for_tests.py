"""Small tokenizers of each kind, trained here: nothing is downloaded."""

from __future__ import annotations

import json
from functools import cache

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from server.text.tokenizer import Tokenizer as ServerTokenizer
from tests.support.tiny_checkpoint import CORPUS, tiny_tokenizer

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


@cache
def byte_level():
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([AddedToken("été", normalized=False), AddedToken("日本 語", normalized=False)])
    return ServerTokenizer(tokenizer)


def _sentencepiece(decoder):
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=["<unk>", "<s>", "</s>", *BYTES], show_progress=False)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.train_from_iterator(CORPUS.splitlines(), trainer)
    # The trainer calls the byte tokens special; in a real file they are ordinary.
    vocab = tokenizer.get_vocab(with_added_tokens=True)
    merges = [tuple(m) for m in json.loads(tokenizer.to_str())["model"]["merges"]]
    plain = Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    plain.normalizer = tokenizer.normalizer
    plain.add_special_tokens(["<unk>", "<s>", "</s>"])
    plain.decoder = decoder
    return ServerTokenizer(plain)


@cache
def llama2():
    return _sentencepiece(
        decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    )


@cache
def metaspace():
    return _sentencepiece(decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()]))


@cache
def word_piece():
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=600, special_tokens=["[UNK]"], show_progress=False)
    tokenizer.train_from_iterator(CORPUS.splitlines(), trainer)
    return ServerTokenizer(tokenizer)


ALL = {"byte_level": byte_level, "llama2": llama2, "metaspace": metaspace, "word_piece": word_piece}
