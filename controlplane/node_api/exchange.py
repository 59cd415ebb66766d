"""HTTP exchanges over one relay stream: many at once, each with its own windows (proto/slmfleet/v1/relay.proto).

No gRPC here: frames come in through ``RelayLink.receive`` and go out through ``RelayLink.write_to``. Everything that a
frame causes happens in the call that brought it, so the stream's reader never waits for a slow consumer: what an
exchange has not consumed yet is bounded by its window, and a node that sends more than it may is reset.

States of an exchange, as its consumer sees it::

    waiting --Head--> streaming --End--> complete
       |                  |
       +--- Reset, timeout, link lost, close() ---> failed
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable

from slmfleet import logs
from slmfleet.v1 import relay_pb2 as pb

log = logs.get(__name__)

# Bytes of Data in flight per exchange and direction, as the protocol fixes it.
WINDOW = 64 * 1024
# The largest Data frame that we send: other exchanges get their turn between two of them.
_FRAME = 16 * 1024
_REPORT_AFTER = WINDOW // 2
# Exchanges and unsent frames of one link: far above what a node can serve, and bounded.
MAX_EXCHANGES = 512
_MAX_OUTBOX = 8192


class RelayError(Exception):
    """An exchange that did not complete. ``began``: the head of the answer had arrived."""

    def __init__(self, code: str, message: str, began: bool) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.began = began


class LinkLost(RelayError):
    """The stream to the node broke."""

    def __init__(self, reason: str, began: bool) -> None:
        super().__init__("link_lost", reason, began)


class ExchangeReset(RelayError):
    """The node gave the exchange up, broke the protocol, or may take no more; ``code`` says which."""


class ExchangeTimeout(RelayError):
    """The answer was not complete within ``timeout_s``."""


class RelayResponse:
    """The head of an answer, and its body as an async iterator of byte chunks.

    Iterating raises RelayError when the exchange fails midway. Whoever does not read to the end calls ``close``.
    """

    __slots__ = ("_exchange", "headers", "status")

    def __init__(self, exchange: _Exchange, status: int, headers: list[tuple[str, str]]) -> None:
        self.status = status
        self.headers = headers
        self._exchange = exchange

    def __aiter__(self) -> RelayResponse:
        return self

    async def __anext__(self) -> bytes:
        chunk = await self._exchange.next_chunk()
        if chunk is None:
            raise StopAsyncIteration
        return chunk

    async def read(self, limit: int) -> bytes:
        """The whole rest of the body. Raises ExchangeReset ("too_large") when it is longer than ``limit`` bytes."""
        parts = []
        size = 0
        async for chunk in self:
            size += len(chunk)
            if size > limit:
                self.close()
                raise ExchangeReset("too_large", f"the answer is longer than {limit} bytes", began=True)
            parts.append(chunk)
        return b"".join(parts)

    def close(self) -> None:
        """Forget the rest: the node is told to stop. Does nothing after the end."""
        self._exchange.close()


class _Exchange:
    __slots__ = (
        "_changed",
        "_chunks",
        "_consumed",
        "_credit",
        "_deadline",
        "_ended",
        "_error",
        "_finished",
        "_granted",
        "_head",
        "_id",
        "_link",
        "_pending",
        "_sendable",
        "_sent_all",
        "_upload",
    )

    def __init__(self, link: RelayLink, request_id: int, timeout_s: float) -> None:
        self._link = link
        self._id = request_id
        self._head: pb.Head | None = None
        self._chunks: deque[bytes] = deque()
        self._granted = WINDOW
        self._consumed = 0
        self._ended = False
        self._error: RelayError | None = None
        self._finished = False
        self._changed: asyncio.Future[None] | None = None
        self._credit = WINDOW
        self._pending = memoryview(b"")
        self._sendable: asyncio.Future[None] | None = None
        self._sent_all = False
        self._upload: asyncio.Task[None] | None = None
        self._deadline = asyncio.get_running_loop().call_later(timeout_s, self._time_out, timeout_s)

    # --- what the consumer calls ----------------------------------------------------------------------------------

    def start(self, body: bytes | AsyncIterator[bytes]) -> None:
        if isinstance(body, (bytes, bytearray, memoryview)):
            self._pending = memoryview(body)
            self._pump(last=True)
        else:
            self._upload = asyncio.create_task(self._send_all(body), name=f"relay-upload-{self._id}")

    async def head(self) -> pb.Head:
        while self._head is None:
            if self._error is not None:
                raise self._error
            await self._wait()
        return self._head

    async def next_chunk(self) -> bytes | None:
        """Everything that has arrived; None at the end."""
        while not self._chunks:
            if self._error is not None:
                raise self._error
            if self._ended:
                return None
            await self._wait()
        chunk = self._chunks[0] if len(self._chunks) == 1 else b"".join(self._chunks)
        self._chunks.clear()
        self._consumed += len(chunk)
        if self._consumed >= _REPORT_AFTER and not self._ended:
            self._link.send(pb.Frame(request_id=self._id, window=pb.WindowUpdate(bytes=self._consumed)))
            self._granted += self._consumed
            self._consumed = 0
        return chunk

    def close(self) -> None:
        if not self._finished:
            self._link.send(pb.Frame(request_id=self._id, reset=pb.Reset(code="cancelled")))
            self.fail(ExchangeReset("cancelled", "the caller left", self._head is not None))

    # --- what the link calls --------------------------------------------------------------------------------------

    def on_head(self, head: pb.Head) -> None:
        if self._head is None:
            self._head = head
            self._wake()

    def on_data(self, body: bytes) -> None:
        self._granted -= len(body)
        if self._granted < 0 or self._head is None:
            what = "more than its window" if self._head is not None else "data before the head"
            self._reset("internal", f"the node sent {what}")
        elif body:
            self._chunks.append(body)
            self._wake()

    def on_window(self, size: int) -> None:
        self._credit += size
        if self._upload is None:
            self._pump(last=True)
        elif self._sendable is not None and not self._sendable.done():
            self._sendable.set_result(None)

    def on_end(self) -> None:
        if self._head is None:
            self._reset("internal", "the node ended its answer before it began")
            return
        self._ended = True
        if not self._sent_all:
            # The answer came before the whole question was read: the rest is of no use to the node.
            self._link.send(pb.Frame(request_id=self._id, reset=pb.Reset(code="cancelled")))
        self._finish()

    def fail(self, error: RelayError) -> None:
        self._error = error
        self._finish()

    @property
    def began(self) -> bool:
        return self._head is not None

    # --- inner ----------------------------------------------------------------------------------------------------

    def _pump(self, *, last: bool) -> None:
        """Send as much of ``_pending`` as the window lets through, and End after the ``last`` byte."""
        while self._pending and self._credit > 0:
            size = min(len(self._pending), self._credit, _FRAME)
            self._link.send(pb.Frame(request_id=self._id, data=pb.Data(body=bytes(self._pending[:size]))))
            self._pending = self._pending[size:]
            self._credit -= size
        if last and not self._pending and not self._sent_all:
            self._sent_all = True
            self._link.send(pb.Frame(request_id=self._id, end=pb.End()))

    async def _send_all(self, body: AsyncIterator[bytes]) -> None:
        try:
            async for chunk in body:
                self._pending = memoryview(chunk)
                self._pump(last=False)
                while self._pending:
                    self._sendable = asyncio.get_running_loop().create_future()
                    await self._sendable
                    self._pump(last=False)
            self._pump(last=True)
        except Exception as error:  # noqa: BLE001 - the caller's iterator may raise anything; it fails this exchange
            log.warning("request body failed", node=self._link.node_id, error=repr(error))
            self._upload = None
            self._reset("cancelled", f"the request's body could not be read: {error}")

    def _time_out(self, timeout_s: float) -> None:
        self._link.send(pb.Frame(request_id=self._id, reset=pb.Reset(code="timeout")))
        self.fail(ExchangeTimeout("timeout", f"no complete answer within {timeout_s:g} s", self.began))

    def _reset(self, code: str, message: str) -> None:
        self._link.send(pb.Frame(request_id=self._id, reset=pb.Reset(code=code, message=message)))
        self.fail(ExchangeReset(code, message, self.began))

    def _finish(self) -> None:
        if not self._finished:
            self._finished = True
            self._deadline.cancel()
            if self._upload is not None:
                self._upload.cancel()
            self._link.forget(self._id)
        self._wake()

    async def _wait(self) -> None:
        self._changed = asyncio.get_running_loop().create_future()
        try:
            await self._changed
        finally:
            self._changed = None

    def _wake(self) -> None:
        if self._changed is not None and not self._changed.done():
            self._changed.set_result(None)


class RelayLink:
    """One relay stream of one node, from the server's side."""

    def __init__(self, node_id: str) -> None:
        self.node_id = node_id
        self.closed = asyncio.Event()
        self.reason = ""
        self._exchanges: dict[int, _Exchange] = {}
        self._last_id = 0
        self._outbox: deque[pb.Frame] = deque()
        self._more = asyncio.Event()

    @property
    def in_flight(self) -> int:
        """Exchanges that are open now."""
        return len(self._exchanges)

    async def request(
        self,
        method: str,
        path: str,
        headers: Iterable[tuple[str, str]],
        body: bytes | AsyncIterator[bytes],
        timeout_s: float,
    ) -> RelayResponse:
        """Send a request to the node's API and wait for the head of its answer.

        ``timeout_s`` bounds the whole exchange, body included. Cancelling the call, or closing the answer, cancels the
        work on the node. Raises LinkLost, ExchangeReset or ExchangeTimeout.
        """
        if self.closed.is_set():
            raise LinkLost(self.reason, began=False)
        if len(self._exchanges) >= MAX_EXCHANGES or len(self._outbox) >= _MAX_OUTBOX:
            raise ExchangeReset("refused", "too many requests wait for this node", began=False)
        self._last_id += 1
        exchange = self._exchanges[self._last_id] = _Exchange(self, self._last_id, timeout_s)
        head_lines = [pb.Header(name=name, value=value) for name, value in headers]
        opening = pb.Open(method=method, path=path, headers=head_lines, timeout_s=timeout_s)
        self.send(pb.Frame(request_id=self._last_id, open=opening))
        try:
            exchange.start(body)
            head = await exchange.head()
        except BaseException:
            exchange.close()
            raise
        return RelayResponse(exchange, head.status, [(line.name, line.value) for line in head.headers])

    def receive(self, frame: pb.Frame) -> None:
        """Take one frame from the node. Frames of exchanges that are over are dropped: they crossed our Reset."""
        exchange = self._exchanges.get(frame.request_id)
        if exchange is None:
            return
        match frame.WhichOneof("frame"):
            case "data":
                exchange.on_data(frame.data.body)
            case "head":
                exchange.on_head(frame.head)
            case "window":
                exchange.on_window(frame.window.bytes)
            case "end":
                exchange.on_end()
            case "reset":
                code = frame.reset.code or "internal"
                message = frame.reset.message or f"the node gave the request up ({code})"
                exchange.fail(ExchangeReset(code, message, exchange.began))
            case _:
                pass

    async def write_to(self, write: Callable[[pb.Frame], Awaitable[None]]) -> None:
        """Hand every outgoing frame to ``write``, in order, until cancelled."""
        while True:
            await self._more.wait()
            self._more.clear()
            while self._outbox:
                await write(self._outbox.popleft())

    def close(self, reason: str) -> None:
        """Fail every open exchange at once. Closing twice does nothing."""
        if self.closed.is_set():
            return
        self.reason = reason
        self.closed.set()
        for exchange in list(self._exchanges.values()):
            exchange.fail(LinkLost(reason, exchange.began))

    def send(self, frame: pb.Frame) -> None:
        """Queue a frame for the node."""
        if not self.closed.is_set():
            self._outbox.append(frame)
            self._more.set()

    def forget(self, request_id: int) -> None:
        """The exchange is over."""
        self._exchanges.pop(request_id, None)
