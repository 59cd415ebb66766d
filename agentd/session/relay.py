"""Requests from the gateway, over a stream that this node opened: each runs the same application as the local API."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import grpc
import grpc.aio

from agentd.session.backoff import reconnect_delay_s
from agentd.session.exchange import App, Exchange, WindowExceeded
from slmfleet import logs
from slmfleet.v1 import relay_pb2 as pb
from slmfleet.v1 import relay_pb2_grpc

log = logs.get(__name__)

MAX_EXCHANGES = 256
QUEUE_LENGTH = 64
# A request that states no time-out still has one.
LONGEST_S = 3600.0


class Relay:
    """Serves ``app`` over Relay.Serve. One stream at a time."""

    def __init__(self, app: App) -> None:
        self._app = app
        self._exchanges: dict[int, Exchange] = {}

    async def serve(self, channel: grpc.aio.Channel) -> None:
        """Keep a relay stream open on ``channel`` until cancelled."""
        failures = 0
        while True:
            call = relay_pb2_grpc.RelayStub(channel).Serve()
            try:
                served = await self._serve_stream(call)
                failures = 1 if served else failures + 1
            except Exception:  # a bug in the relay must not end the session
                log.error("the relay failed", exc_info=True)
                failures += 1
            finally:
                call.cancel()
            delay_s = reconnect_delay_s(failures, random.random())
            log.info("relay stream ended", next_try_s=round(delay_s, 1))
            await asyncio.sleep(delay_s)

    async def _serve_stream(self, call: Any) -> bool:
        """Serve one stream to its end; whether any frame came."""
        outgoing: asyncio.Queue[pb.Frame] = asyncio.Queue(QUEUE_LENGTH)
        served = False
        async with asyncio.TaskGroup() as tasks:
            writer = tasks.create_task(_write(call, outgoing), name="relay writer")
            running: set[asyncio.Task[None]] = set()
            try:
                while (frame := await call.read()) is not grpc.aio.EOF:
                    served = True
                    self._take(frame, outgoing, tasks, running)
            except (grpc.RpcError, asyncio.InvalidStateError):
                pass
            finally:
                writer.cancel()
                for task in running:
                    task.cancel()
        return served

    def _take(
        self,
        frame: pb.Frame,
        outgoing: asyncio.Queue[pb.Frame],
        tasks: asyncio.TaskGroup,
        running: set[asyncio.Task[None]],
    ) -> None:
        if frame.WhichOneof("frame") == "open":
            exchange = Exchange(frame.request_id, frame.open, outgoing.put)
            refuse = len(self._exchanges) >= MAX_EXCHANGES or frame.request_id in self._exchanges
            if not refuse:
                # Known before its task first runs: its Data frames may come right behind.
                self._exchanges[frame.request_id] = exchange
            work = self._refuse(exchange, outgoing) if refuse else self._serve_exchange(exchange, frame.open, outgoing)
            task = tasks.create_task(work, name=f"relayed request {frame.request_id}")
            running.add(task)
            task.add_done_callback(running.discard)
            return
        known = self._exchanges.get(frame.request_id)
        if known is None:
            return  # An exchange that ended on this side: its last frames crossed ours.
        try:
            known.receive_frame(frame)
        except WindowExceeded:
            log.warning("the gateway sent more than its window", request=frame.request_id)
            known.violation = "more bytes were sent than the window allows"
            known.disconnect()

    async def _refuse(self, exchange: Exchange, outgoing: asyncio.Queue[pb.Frame]) -> None:
        await outgoing.put(_reset(exchange.id, "refused", f"the node relays {MAX_EXCHANGES} requests already"))

    async def _serve_exchange(self, exchange: Exchange, opened: pb.Open, outgoing: asyncio.Queue[pb.Frame]) -> None:
        code, message = "internal", "the answer ended early"
        try:
            async with asyncio.timeout(min(opened.timeout_s or LONGEST_S, LONGEST_S)):
                await exchange.serve(self._app)
        except TimeoutError:
            code, message = "timeout", "the caller's time is over"
        except Exception:  # one request must not end the others
            log.error("a relayed request failed", exc_info=True, request=exchange.id)
            message = "the node failed to answer"
        finally:
            del self._exchanges[exchange.id]
        if exchange.violation:
            await outgoing.put(_reset(exchange.id, "refused", exchange.violation))
        elif not exchange.complete and not exchange.disconnected:
            await outgoing.put(_reset(exchange.id, code, message))


async def _write(call: Any, outgoing: asyncio.Queue[pb.Frame]) -> None:
    try:
        while True:
            await call.write(await outgoing.get())
    except (grpc.RpcError, asyncio.InvalidStateError):
        # The reader sees the end of the stream, too, and ends everything; until then nobody may block on a full queue.
        while True:
            await outgoing.get()


def _reset(request_id: int, code: str, message: str) -> pb.Frame:
    return pb.Frame(request_id=request_id, reset=pb.Reset(code=code, message=message))
