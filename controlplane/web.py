"""One HTTP port for REST, gateway and probes: uvicorn in this process, on a socket that was bound before."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator, Mapping

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send


class ByPrefix:
    """Hands a request to the application whose prefix its path begins with, else to ``rest``.

    Not Starlette's Mount: that one rewrites the path, and each application here knows its full paths.
    """

    def __init__(self, rest: ASGIApp, parts: Mapping[str, ASGIApp]) -> None:
        self._rest = rest
        self._parts = dict(parts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = str(scope.get("path", ""))
        for prefix, part in self._parts.items():
            if path == prefix or path.startswith(prefix + "/"):
                await part(scope, receive, send)
                return
        await self._rest(scope, receive, send)


class _Quiet(uvicorn.Server):
    """Leaves signals to the program."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class HttpServer:
    """Serves ``app`` on ``listener`` until cancelled; running requests get ``stop_s`` seconds to end."""

    def __init__(self, app: ASGIApp, listener: socket.socket, stop_s: float) -> None:
        self._listener = listener
        self._server = _Quiet(
            uvicorn.Config(
                app,
                log_config=None,
                access_log=False,
                lifespan="off",
                server_header=False,
                timeout_graceful_shutdown=max(1, round(stop_s)),
            )
        )

    async def run(self) -> None:
        """See the class."""
        serving = asyncio.create_task(self._server.serve(sockets=[self._listener]), name="uvicorn")
        try:
            await asyncio.shield(serving)
        except asyncio.CancelledError:
            self._server.should_exit = True
            await serving
            raise
