"""Tests of TextWork: which texts wait for which other texts, cancellation, and the size of a step.

A `Gate` makes the tokenising of chosen pieces of text wait, so that a test decides which pieces run. The tokenizers are real.
"""

import asyncio
import threading

import pytest

from engine.errors import Overloaded
from server.service.text_work import HUGE, INLINE_CHARS, INLINE_TOKENS, TextWork, TooManyTokens
from server.text.tokenizer import PIECE_CHARS, PIECE_TOKENS, Tokenizer
from tests.support.local_engine import until
from tests.unit.server.text.tokenizers_for_tests import ALL, CUT, byte_level, llama2, llama2_by_words

BUDGET = 1 << 20
ALL_TOKENIZERS = ALL | CUT
SHORT = "The tide gate. " * 200  # 3,000 characters
LONG = "The tide gate, and the sea. " * 4000  # 112,000 characters, several pieces
HUGE_WORD = "x" * (HUGE + 1)


class Gate:
    """Records the pieces that are tokenised. A piece for which `holds` returns True waits until `open` is called."""

    def __init__(self, monkeypatch):
        self.pieces = []
        self.threads = set()
        self.holds = lambda piece: False
        self._open = threading.Event()
        encode = Tokenizer._encode_piece

        def gated(tokenizer, piece):
            self.pieces.append(piece)
            self.threads.add(threading.current_thread())
            if self.holds(piece):
                assert self._open.wait(30)
            return encode(tokenizer, piece)

        monkeypatch.setattr(Tokenizer, "_encode_piece", gated)

    def open(self):
        self._open.set()


@pytest.fixture
def gate(monkeypatch):
    gate = Gate(monkeypatch)
    yield gate
    gate.open()


@pytest.fixture
def work():
    return TextWork(byte_level(), BUDGET)


def encode(work, text, limit=None):
    return asyncio.create_task(work.encode(text, add_special_tokens=False, limit=limit))


def ids_of(text):
    return byte_level()._tokenizer.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("text", ["", "a", "x" * INLINE_CHARS, SHORT, LONG, HUGE_WORD], ids=len)
async def test_a_text_of_any_length_has_the_librarys_ids(work, gate, text):
    assert await encode(work, text) == ids_of(text)
    in_loop = threading.main_thread() in gate.threads
    assert in_loop == (len(text) <= INLINE_CHARS)


async def test_short_texts_do_not_wait_for_long_ones(work, gate):
    gate.holds = lambda piece: len(piece) >= PIECE_CHARS
    huge = encode(work, HUGE_WORD)
    await until(lambda: len(gate.pieces) == 1)  # the gate holds a piece in the thread for huge pieces
    long = [encode(work, LONG) for _ in range(5)]
    await until(lambda: len(gate.pieces) == 2)  # the gate holds a piece in the thread for long texts
    for text in (SHORT, "x" * (PIECE_CHARS - 1)):
        assert await encode(work, text) == ids_of(text)
    assert not any(task.done() for task in (huge, *long))
    gate.open()
    assert await asyncio.gather(huge, *long) == [ids_of(HUGE_WORD)] + [ids_of(LONG)] * 5


async def test_long_texts_do_not_wait_for_a_huge_piece(work, gate):
    gate.holds = lambda piece: len(piece) > HUGE
    huge = [encode(work, HUGE_WORD), encode(work, HUGE_WORD)]
    await until(lambda: len(gate.pieces) == 1)
    assert await encode(work, LONG) == ids_of(LONG)
    assert sum(len(piece) > HUGE for piece in gate.pieces) == 1  # the second huge piece waits for the first
    assert not any(task.done() for task in huge)
    gate.open()
    await asyncio.gather(*huge)


async def test_long_texts_alternate_piece_by_piece(work, gate):
    texts = [LONG.replace("tide", name) for name in ("aaaa", "bbbb", "cccc")]
    await asyncio.gather(*[encode(work, text) for text in texts])
    order = [next(i for i, name in enumerate(("aaaa", "bbbb", "cccc")) if name in piece) for piece in gate.pieces]
    for done in range(len(order)):
        counts = [order[:done].count(i) for i in range(3)]
        assert max(counts) - min(counts) <= 1


async def test_a_cancelled_text_is_not_tokenised_any_further(work, gate):
    gate.holds = lambda piece: "first" in piece
    first = encode(work, "first " + LONG)
    await until(lambda: len(gate.pieces) == 1)
    others = [encode(work, LONG) for _ in range(3)]
    await asyncio.sleep(0)
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
    gate.open()
    await first
    assert "".join(gate.pieces) == "first " + LONG
    assert work._waiting_bytes == 0


async def test_a_text_is_tokenised_no_further_than_the_limit(work, gate):
    with pytest.raises(TooManyTokens):
        await encode(work, LONG.replace(" ", ","), limit=len(ids_of(LONG[:PIECE_CHARS])))
    assert len(gate.pieces) <= 2
    assert work._waiting_bytes == 0


async def test_a_text_that_is_certainly_too_long_is_not_tokenised_at_all(work, gate):
    with pytest.raises(TooManyTokens):
        await encode(work, "a " * 2_000_000, limit=4095)
    assert gate.pieces == []


async def test_long_texts_are_bounded_in_total_and_short_ones_are_always_accepted(gate):
    work = TextWork(byte_level(), 2 * len(LONG))
    gate.holds = lambda piece: len(piece) >= PIECE_CHARS
    tasks = [encode(work, LONG), encode(work, LONG)]
    await until(lambda: len(gate.pieces) == 1)
    with pytest.raises(Overloaded, match=f"{2 * len(LONG)} bytes of long texts wait"):
        await encode(work, LONG)
    with pytest.raises(Overloaded):
        await work.decode(range(PIECE_TOKENS + 1))
    assert await encode(work, SHORT) == ids_of(SHORT)
    gate.open()
    await asyncio.gather(*tasks)
    assert await encode(work, LONG) == ids_of(LONG)


async def test_while_a_text_over_the_bound_runs_short_texts_and_short_decodes_are_accepted(gate):
    work = TextWork(byte_level(), 1000)
    gate.holds = lambda piece: len(piece) >= PIECE_CHARS
    long = encode(work, LONG)
    await until(lambda: len(gate.pieces) == 1)
    for text in ("x" * (INLINE_CHARS + 1), SHORT, "x" * (PIECE_CHARS - 1)):
        assert await encode(work, text) == ids_of(text)
    for num in (INLINE_TOKENS + 1, PIECE_TOKENS):
        assert len(await work.decode([300] * num)) > 0
    with pytest.raises(Overloaded):
        await encode(work, LONG)
    gate.open()
    await long


async def test_one_text_over_the_bound_is_accepted_alone():
    assert await encode(TextWork(byte_level(), 1000), LONG) == ids_of(LONG)


@pytest.mark.parametrize("make", [byte_level, llama2, llama2_by_words])
@pytest.mark.parametrize("num", [1, INLINE_TOKENS + 1, 100_000])
async def test_ids_become_text_in_small_steps(make, num, monkeypatch):
    tokenizer, sizes, ticks = make(), [], 0

    async def tick():
        nonlocal ticks
        while True:
            ticks += 1
            await asyncio.sleep(0)

    decode = Tokenizer.decode_tokens
    monkeypatch.setattr(Tokenizer, "decode_tokens", lambda self, ids: sizes.append(len(ids)) or decode(self, ids))
    ids = [300 + i % 200 for i in range(num)]
    ticker = asyncio.create_task(tick())
    assert await TextWork(tokenizer, BUDGET).decode(ids) == tokenizer._tokenizer.decode(ids)
    ticker.cancel()
    assert max(sizes, default=0) <= PIECE_TOKENS + 4
    assert ticks >= num // PIECE_TOKENS


async def test_long_templates_are_rendered_in_a_thread(work):
    threads = []
    for num_chars in (10, INLINE_CHARS + 1, PIECE_CHARS + 1):
        assert await work.render(lambda: threads.append(threading.current_thread().name) or "text", num_chars) == "text"
    assert threads[0] == threading.main_thread().name
    assert ["short" in threads[1], "chat" in threads[2]] == [True, True]


TEXTS = ["", "The tide gate", "  two  spaces ", "a🐟bc", "été\n\ndéjà vu", "ﬁsh №5", "1234567 x_y", "日本語、中文。"]


@pytest.mark.parametrize("name", ALL_TOKENIZERS)
async def test_the_tokens_of_a_text_begin_where_the_text_has_them(name):
    """The text of each token, as the tokenizer decodes it, stands at its offset, if the tokenizer keeps the text as it is."""
    tokenizer = ALL_TOKENIZERS[name]()
    work = TextWork(tokenizer, BUDGET)
    for text in TEXTS:
        ids = tokenizer.encode(text)
        offsets = await work.offsets_in(text, ids)
        assert len(offsets) == len(ids)
        assert offsets == sorted(offsets)
        assert all(0 <= offset <= len(text) for offset in offsets)
        before, after = tokenizer.num_around(text)
        inner, places = ids[before : len(ids) - after], offsets[before : len(ids) - after]
        decoded = tokenizer.decode(inner, skip_special_tokens=False)
        assert places[:1] in ([], [0])
        if decoded == text:
            detokenizer, length = tokenizer.detokenizer(skip_special_tokens=False), 0
            for token, place in zip(inner, places, strict=True):
                assert place == length
                length += len(detokenizer.add([token]))


async def test_a_normalised_text_has_the_offsets_of_the_text_before_it():
    tokenizer = ALL_TOKENIZERS["nfkc"]()
    text = "ﬁﬁ x"  # each ligature becomes two letters
    ids = tokenizer.encode(text)
    offsets = await TextWork(tokenizer, BUDGET).offsets_in(text, ids)
    assert tokenizer.decode(ids) == "fifi x"
    assert (offsets[0], offsets[-1]) in ((0, 2), (0, 3))
    assert max(offsets) <= len(text)
