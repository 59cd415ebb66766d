"""Serving the API over HTTP/1.1 with uvicorn, on a socket that is bound before anything else starts."""

from __future__ import annotations

import contextlib
import logging
import socket
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn

from slmfleet.errors import UserError


def bind(address: tuple[str, int]) -> socket.socket:
    """A bound socket. Raises UserError when the address is taken or is none of this device's."""
    host, port = address
    try:
        family, kind, proto, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise UserError(f"cannot listen on {host}:{port}: {error.strerror}; give another api_listen") from error
    listener = socket.socket(family, kind, proto)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(where)
        listener.listen(128)
    except OSError as error:
        listener.close()
        raise UserError(
            f"cannot listen on {host}:{port}: {error.strerror}; choose another address with --api-listen "
            "(port 0 takes a free one)"
        ) from error
    return listener


def address_of(listener: socket.socket) -> str:
    """``host:port`` as others write it."""
    host, port = listener.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers: the daemon decides when and in what order things stop."""

    def __init__(self, config: uvicorn.Config, started: Callable[[], None]) -> None:
        super().__init__(config)
        self._tell = started

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._tell()


class ApiServer:
    """Serves ``app`` on ``listener`` until ``stop`` is called or the task is cancelled."""

    def __init__(self, app: Any, listener: socket.socket, started: Callable[[], None]) -> None:
        config = uvicorn.Config(
            app,
            http="h11",
            ws="none",
            loop="asyncio",
            lifespan="off",
            interface="asgi3",
            log_config=None,
            access_log=False,
            server_header=False,
            date_header=False,
            proxy_headers=False,
            timeout_keep_alive=30,
            timeout_graceful_shutdown=1,
        )
        # Its start and stop are told by the daemon.
        logging.getLogger("uvicorn").setLevel(logging.WARNING)
        self._listener = listener
        self._server = _Server(config, started)

    async def run(self) -> None:
        """Serve."""
        await self._server.serve(sockets=[self._listener])

    def stop(self) -> None:
        """Close the listener, end connections; ``run`` returns."""
        self._server.should_exit = True
