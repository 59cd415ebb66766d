"""A TCP proxy that makes a bad line out of a good one: delay, a low rate, connections that are half open.

It runs on an event loop in a thread of its own, so that tests without a loop can use it; its knobs may be turned from
any thread at any time.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from typing import Self

_CHUNK = 16 * 1024


class TcpProxy:
    """``with TcpProxy("127.0.0.1", port) as proxy``: listens on ``proxy.port``.

    ``delay_s``: how much later bytes arrive, each way. ``bytes_per_s``: the rate of each connection and direction;
    0 = no limit. ``half_open``: connections stay up and new ones are taken, but no byte and no end goes through.
    """

    def __init__(self, host: str, port: int, listen: str = "127.0.0.1", listen_port: int = 0) -> None:
        self.delay_s = 0.0
        self.bytes_per_s = 0
        self.half_open = False
        # How many connections were ever taken, and bytes sent on to (listener, target) sides.
        self.connections = 0
        self.bytes_up = 0
        self.bytes_down = 0
        self.port = listen_port
        self._target = (host, port)
        self._listen = listen
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._ended = asyncio.Event()
        self._writers: set[asyncio.StreamWriter] = set()
        self._problem: OSError | None = None
        self._thread = threading.Thread(target=self._run, name="tcp proxy", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        self._ready.wait(10)
        if self._problem:
            raise self._problem
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._ended.set)
        self._thread.join(10)

    def reset(self) -> None:
        """Break every connection with a RST."""
        self._loop.call_soon_threadsafe(self._abort_all)

    def _abort_all(self) -> None:
        for writer in list(self._writers):
            writer.transport.abort()

    def _run(self) -> None:
        with contextlib.closing(self._loop):
            self._loop.run_until_complete(self._serve())

    async def _serve(self) -> None:
        try:
            server = await asyncio.start_server(self._connected, self._listen, self.port)
            self.port = int(server.sockets[0].getsockname()[1])
        except OSError as error:
            self._problem = error
            return
        finally:
            # Not before the port is known: whoever waits for this tells it to others.
            self._ready.set()
        await self._ended.wait()
        server.close()
        self._abort_all()
        others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    async def _connected(self, near_in: asyncio.StreamReader, near_out: asyncio.StreamWriter) -> None:
        self.connections += 1
        self._writers.add(near_out)
        far_out: asyncio.StreamWriter | None = None
        try:
            await self._passable()
            far_in, far_out = await asyncio.open_connection(*self._target)
            self._writers.add(far_out)
            async with asyncio.TaskGroup() as ways:
                ways.create_task(self._pump(near_in, far_out, up=True), name="up")
                ways.create_task(self._pump(far_in, near_out, up=False), name="down")
        except (OSError, ExceptionGroup):
            pass
        except asyncio.CancelledError:
            # asyncio's own callback would print the end of the proxy as an error.
            if not self._ended.is_set():
                raise
        finally:
            for writer in (near_out, far_out):
                if writer is not None:
                    self._writers.discard(writer)
                    writer.transport.abort()

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, up: bool) -> None:
        while True:
            chunk = await source.read(_CHUNK)
            if self.delay_s:
                await asyncio.sleep(self.delay_s)
            await self._passable()
            if not chunk:
                sink.write_eof()
                return
            while chunk:
                size = max(1, self.bytes_per_s // 10) if self.bytes_per_s else len(chunk)
                piece, chunk = chunk[:size], chunk[size:]
                sink.write(piece)
                await sink.drain()
                if up:
                    self.bytes_up += len(piece)
                else:
                    self.bytes_down += len(piece)
                if self.bytes_per_s:
                    await asyncio.sleep(len(piece) / self.bytes_per_s)

    async def _passable(self) -> None:
        while self.half_open:  # noqa: ASYNC110  # the knob may be turned from any thread
            await asyncio.sleep(0.02)
