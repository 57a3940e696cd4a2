"""Tests EventStream: when a comment may be written between the events of a stream."""

import asyncio

from server.http.front import CALL
from server.http.half_close import COMMENT
from server.http.sse import EventStream
from server.service.call_log import CallRecord


async def test_a_comment_is_offered_only_where_what_was_written_ends_with_an_event():
    """`send` waits before it writes, while the client's buffer is full. A comment would be written at once, so it must fit behind
    what has been written, and not behind the piece that waits."""
    may_write = asyncio.Semaphore(0)
    waiting = asyncio.Event()
    scope = {CALL: CallRecord(None, "POST")}
    written = []

    async def send(message):
        waiting.set()
        await may_write.acquire()
        written.append(message.get("body", b""))

    async def receive():
        await asyncio.Event().wait()

    async def events():
        for piece in (b'data: {"large', b'": 1}\n\n', b"data: 2\n\n", b'data: {"large', b'": 3}\n\n'):
            yield piece

    stream = asyncio.create_task(EventStream(events())(scope, receive, send))
    offers = []
    for _ in range(7):  # the head, the five pieces, and the end
        await waiting.wait()
        waiting.clear()
        fits = "".join(piece.decode() for piece in written).endswith("\n\n")
        offers.append((bool(scope[COMMENT]()), fits))
        may_write.release()
    await stream
    assert offers == [(fits, fits) for _, fits in offers]
    assert [offered for offered, _ in offers] == [False, False, False, True, True, False, True]
