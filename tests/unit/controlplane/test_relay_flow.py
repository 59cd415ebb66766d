"""Exchanges over one relay stream: windows, ends, resets, a link that breaks. No network: frames in, frames out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine

import pytest

from controlplane.node_api.exchange import (
    MAX_EXCHANGES,
    WINDOW,
    ExchangeReset,
    ExchangeTimeout,
    LinkLost,
    RelayLink,
    RelayResponse,
)
from slmfleet.v1 import relay_pb2 as pb


class Peer:
    """The node's end of a link."""

    def __init__(self) -> None:
        self.link = RelayLink("node")
        self.frames: asyncio.Queue[pb.Frame] = asyncio.Queue()

    async def next(self, kind: str) -> pb.Frame:
        frame = await asyncio.wait_for(self.frames.get(), 5)
        assert frame.WhichOneof("frame") == kind, frame
        return frame

    def say(self, request_id: int = 1, **frame: object) -> None:
        self.link.receive(pb.Frame(request_id=request_id, **frame))  # type: ignore[arg-type]

    def head(self, request_id: int = 1, status: int = 200) -> None:
        self.say(request_id, head=pb.Head(status=status))

    def data(self, body: bytes, request_id: int = 1) -> None:
        self.say(request_id, data=pb.Data(body=body))

    def end(self, request_id: int = 1) -> None:
        self.say(request_id, end=pb.End())


def with_peer(test: Callable[[Peer, asyncio.TaskGroup], Coroutine[None, None, None]]) -> None:
    async def run() -> None:
        peer = Peer()
        async with asyncio.TaskGroup() as group:
            writer = group.create_task(peer.link.write_to(peer.frames.put))
            await test(peer, group)
            writer.cancel()
        assert peer.link.in_flight == 0

    asyncio.run(run())


def ask(
    peer: Peer, body: bytes | AsyncIterator[bytes] = b"", timeout_s: float = 5
) -> Coroutine[None, None, RelayResponse]:
    return peer.link.request("POST", "/v1/x", [("a", "b")], body, timeout_s)


def test_request_and_answer() -> None:
    async def test(peer: Peer, group: asyncio.TaskGroup) -> None:
        task = group.create_task(ask(peer, b"question"))
        opening = (await peer.next("open")).open
        assert (opening.method, opening.path, opening.timeout_s) == ("POST", "/v1/x", 5)
        assert [(line.name, line.value) for line in opening.headers] == [("a", "b")]
        assert (await peer.next("data")).data.body == b"question"
        await peer.next("end")
        peer.head(status=201)
        response = await task
        assert response.status == 201
        peer.data(b"an")
        peer.data(b"swer")
        peer.end()
        assert await response.read(100) == b"answer"
        response.close()
        assert peer.frames.empty()

    with_peer(test)


def test_a_long_body_waits_for_the_window() -> None:
    async def test(peer: Peer, group: asyncio.TaskGroup) -> None:
        body = bytes(range(256)) * 1024
        task = group.create_task(ask(peer, body))
        await peer.next("open")
        got = b""
        while len(got) < WINDOW:
            got += (await peer.next("data")).data.body
        await asyncio.sleep(0)
        assert peer.frames.empty()
        while len(got) < len(body):
            peer.say(window=pb.WindowUpdate(bytes=10_000))
            while len(got) < len(body):
                try:
                    got += (await asyncio.wait_for(peer.frames.get(), 0.01)).data.body
                except TimeoutError:
                    break
        assert got == body
        await peer.next("end")
        peer.head()
        peer.end()
        assert await (await task).read(0) == b""

    with_peer(test)


def test_a_body_can_be_an_iterator_and_its_failure_is_the_exchanges() -> None:
    async def good() -> AsyncIterator[bytes]:
        yield b"one"
        yield b"x" * WINDOW

    async def bad() -> AsyncIterator[bytes]:
        yield b"one"
        raise ValueError("the disk is gone")

    async def test(peer: Peer, group: asyncio.TaskGroup) -> None:
        task = group.create_task(ask(peer, good()))
        await peer.next("open")
        size = 0
        while size < WINDOW:
            size += len((await peer.next("data")).data.body)
        peer.say(window=pb.WindowUpdate(bytes=100))
        assert len((await peer.next("data")).data.body) == 3
        await peer.next("end")
        peer.head()
        peer.end()
        await task

        failing = group.create_task(_error(ask(peer, bad())))
        await peer.next("open")
        await peer.next("data")
        await peer.next("reset")
        error = await failing
        assert isinstance(error, ExchangeReset)
        assert "the disk is gone" in error.message

    with_peer(test)


async def _error(work: Coroutine[None, None, object]) -> BaseException | None:
    try:
        await work
    except Exception as error:  # noqa: BLE001 - the test looks at it
        return error
    return None


def test_what_is_consumed_is_granted_again() -> None:
    async def test(peer: Peer, group: asyncio.TaskGroup) -> None:
        task = group.create_task(ask(peer))
        await peer.next("open")
        await peer.next("end")
        peer.head()
        response = await task
        peer.data(b"x" * WINDOW)
        await asyncio.sleep(0)
        assert peer.frames.empty()
        assert len(await anext(response)) == WINDOW
        assert (await peer.next("window")).window.bytes == WINDOW
        peer.data(b"y" * WINDOW)
        peer.end()
        assert await response.read(WINDOW) == b"y" * WINDOW

    with_peer(test)


def test_a_node_that_sends_more_than_its_window_is_reset() -> None:
    async def test(peer: Peer, group: asyncio.TaskGroup) -> None:
        task = group.create_task(ask(peer))
        await peer.next("open")
        await peer.next("end")
        peer.head()
        response = await task
        peer.data(b"x" * WINDOW)
        peer.data(b"x")
        assert (await peer.next("reset")).reset.code == "internal"
        assert len(await anext(response)) == WINDOW
        with pytest.raises(ExchangeReset, match="more than its window"):
            await anext(response)

    with_peer(test)


@pytest.mark.parametrize("began", [False, True])
def test_a_broken_link_fails_everything_at_once(began: bool) -> None:
    async def test(peer: Peer, group: asyncio.TaskGroup) -> None:
        tasks = [group.create_task(_error(ask(peer))) for _ in range(3)]
        for _ in tasks:
            await peer.next("open")
            await peer.next("end")
        if began:
            peer.head(3)
            await tasks[2]
        reading = group.create_task(_error(_read_third(peer))) if began else None
        await asyncio.sleep(0)
        peer.link.close("cable cut")
        for task in tasks[:2]:
            error = await task
            assert isinstance(error, LinkLost)
            assert not error.began
        if reading is not None:
            error = await reading
            assert isinstance(error, LinkLost)
            assert error.began
        with pytest.raises(LinkLost, match="cable cut"):
            await ask(peer)

    async def _read_third(peer: Peer) -> None:
        # The response object was thrown away by _error; the exchange itself is still open.
        exchange = peer.link._exchanges[3]
        await exchange.next_chunk()

    with_peer(test)


def test_leaving_tells_the_node_to_stop() -> None:
    async def test(peer: Peer, group: asyncio.TaskGroup) -> None:
        waiting = group.create_task(ask(peer))
        await peer.next("open")
        await peer.next("end")
        waiting.cancel()
        assert (await peer.next("reset")).reset.code == "cancelled"

        task = group.create_task(ask(peer))
        await peer.next("open")
        await peer.next("end")
        peer.head(2)
        response = await task
        response.close()
        assert (await peer.next("reset")).request_id == 2
        # What was on its way is dropped without a word.
        peer.data(b"late", 2)
        peer.end(2)
        with pytest.raises(ExchangeReset):
            await anext(response)

    with_peer(test)


def test_a_time_out_covers_the_whole_exchange() -> None:
    async def test(peer: Peer, group: asyncio.TaskGroup) -> None:
        error = await _error(ask(peer, timeout_s=0.01))
        assert isinstance(error, ExchangeTimeout)
        assert not error.began
        task = group.create_task(ask(peer, timeout_s=0.05))
        await asyncio.sleep(0)
        peer.head(2)
        response = await task
        peer.data(b"partly", 2)
        assert await anext(response) == b"partly"
        with pytest.raises(ExchangeTimeout):
            await anext(response)
        kinds = [peer.frames.get_nowait().WhichOneof("frame") for _ in range(peer.frames.qsize())]
        assert kinds.count("reset") == 2

    with_peer(test)


def test_a_reset_by_the_node_carries_its_words() -> None:
    async def test(peer: Peer, group: asyncio.TaskGroup) -> None:
        task = group.create_task(_error(ask(peer)))
        await peer.next("open")
        peer.say(reset=pb.Reset(code="refused", message="full"))
        error = await task
        assert isinstance(error, ExchangeReset)
        assert (error.code, error.message, error.began) == ("refused", "full", False)

    with_peer(test)


def test_an_early_answer_stops_the_upload() -> None:
    async def test(peer: Peer, group: asyncio.TaskGroup) -> None:
        task = group.create_task(ask(peer, b"x" * (2 * WINDOW)))
        await peer.next("open")
        peer.head(status=413)
        peer.data(b"too long")
        peer.end()
        response = await task
        assert await response.read(100) == b"too long"
        kinds = [(await peer.frames.get()).WhichOneof("frame") for _ in range(5)]
        assert kinds == ["data"] * 4 + ["reset"]

    with_peer(test)


def test_the_number_of_exchanges_is_bounded() -> None:
    async def test(peer: Peer, group: asyncio.TaskGroup) -> None:
        tasks = [group.create_task(_error(ask(peer))) for _ in range(MAX_EXCHANGES)]
        await asyncio.sleep(0)
        with pytest.raises(ExchangeReset, match="too many"):
            await ask(peer)
        peer.link.close("done")
        await asyncio.gather(*tasks)

    with_peer(test)
