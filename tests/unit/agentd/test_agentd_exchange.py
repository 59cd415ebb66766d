"""One relayed exchange: frames to ASGI and back, with windows in both directions."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from agentd.session.exchange import FRAME, WINDOW, Exchange, WindowExceeded
from slmfleet.v1 import relay_pb2 as pb


class Wire:
    """Collects the frames that an exchange emits."""

    def __init__(self) -> None:
        self.frames: list[pb.Frame] = []

    async def emit(self, frame: pb.Frame) -> None:
        self.frames.append(frame)

    def kinds(self) -> list[str]:
        return [frame.WhichOneof("frame") or "" for frame in self.frames]

    def body(self) -> bytes:
        return b"".join(frame.data.body for frame in self.frames)


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(5):
            await test()

    asyncio.run(bounded())


async def until(true: Callable[[], bool]) -> None:
    """Let other tasks run until ``true()``."""
    while not true():  # noqa: ASYNC110  # yields to tasks of this loop
        await asyncio.sleep(0)


def data(body: bytes) -> pb.Frame:
    return pb.Frame(request_id=1, data=pb.Data(body=body))


END = pb.Frame(request_id=1, end=pb.End())


async def echo(scope: Any, receive: Any, send: Any) -> None:
    body = b""
    while True:
        message = await receive()
        body += message["body"]
        if not message["more_body"]:
            break
    await send({"type": "http.response.start", "status": 200, "headers": [(b"x-path", scope["path"].encode())]})
    await send({"type": "http.response.body", "body": body, "more_body": False})


def opened(path: str = "/v1/x?q=1") -> pb.Open:
    return pb.Open(method="post", path=path, headers=[pb.Header(name="Content-Type", value="application/json")])


def test_a_request_and_its_answer() -> None:
    async def test() -> None:
        wire = Wire()
        exchange = Exchange(1, opened(), wire.emit)
        exchange.receive_frame(data(b"ab"))
        exchange.receive_frame(data(b"cd"))
        exchange.receive_frame(END)
        await exchange.serve(echo)
        assert wire.kinds() == ["head", "data", "end"]
        assert wire.frames[0].head.headers[0].value == "/v1/x"
        assert wire.body() == b"abcd"
        assert exchange.complete

    run(test)


def test_what_the_application_read_is_granted_again() -> None:
    async def test() -> None:
        wire = Wire()
        exchange = Exchange(1, opened(), wire.emit)

        async def feed() -> None:
            for _ in range(5):
                exchange.receive_frame(data(b"x" * WINDOW))
                before = len(wire.frames)
                await until(lambda: len(wire.frames) > before)  # noqa: B023
                assert wire.frames[-1].window.bytes == WINDOW
            exchange.receive_frame(END)

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(feed())
            serving = tasks.create_task(exchange.serve(swallow))
        assert serving.done()

    async def swallow(scope: Any, receive: Any, send: Any) -> None:
        while (await receive())["more_body"]:
            pass

    run(test)


def test_more_than_the_window_is_an_offence() -> None:
    exchange = Exchange(1, opened(), Wire().emit)
    exchange.receive_frame(data(b"x" * WINDOW))
    with pytest.raises(WindowExceeded):
        exchange.receive_frame(data(b"x"))


def test_an_answer_stops_at_the_window_and_goes_on_with_credit() -> None:
    async def test() -> None:
        wire = Wire()
        exchange = Exchange(1, opened(), wire.emit)

        async def big(scope: Any, receive: Any, send: Any) -> None:
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"y" * (WINDOW + 5)})

        async with asyncio.TaskGroup() as tasks:
            serving = tasks.create_task(exchange.serve(big))
            await until(lambda: len(wire.body()) >= WINDOW)
            for _ in range(5):
                await asyncio.sleep(0)
            assert (len(wire.body()), serving.done()) == (WINDOW, False)
            exchange.receive_frame(pb.Frame(request_id=1, window=pb.WindowUpdate(bytes=5)))
        assert len(wire.body()) == WINDOW + 5
        assert max(len(frame.data.body) for frame in wire.frames) <= FRAME
        assert wire.kinds()[-1] == "end"

    run(test)


def test_a_reset_reaches_the_application_as_a_disconnect_and_frees_a_blocked_answer() -> None:
    async def test() -> None:
        wire = Wire()
        exchange = Exchange(1, opened(), wire.emit)
        seen: list[str] = []

        async def app(scope: Any, receive: Any, send: Any) -> None:
            await receive()
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"y" * (WINDOW * 2), "more_body": True})
            seen.append((await receive())["type"])

        exchange.receive_frame(END)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(exchange.serve(app))
            await until(lambda: len(wire.body()) >= WINDOW)
            exchange.receive_frame(pb.Frame(request_id=1, reset=pb.Reset(code="cancelled")))
        assert seen == ["http.disconnect"]
        assert "end" not in wire.kinds()

    run(test)
