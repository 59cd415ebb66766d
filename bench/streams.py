"""A client that costs little and hides nothing: one kept connection, a request written at once, bytes as they come."""

from __future__ import annotations

import contextlib
import json
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from bench.fleet import fleet
from bench.models import deployment, stub_environment, stub_model
from tests.support.processes import Child, accepts, free_port, wait_until

MODEL = "stub"
NODE = "edge-1"
BASELINE = Path(__file__).with_name("asgi_stream.py")
_LAST = b"0\r\n\r\n"


class Streams:
    """Asks one server for streamed chats."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        assert parts.hostname is not None
        self._socket = socket.create_connection((parts.hostname, parts.port or 80), timeout=30)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def close(self) -> None:
        """Close the connection."""
        self._socket.close()

    def ask(self, tokens: int) -> tuple[float, float, int]:
        """Seconds to the first event, seconds to the end, and how many events carried text."""
        body = json.dumps(
            {"model": MODEL, "messages": [{"role": "user", "content": "hello"}], "max_tokens": tokens, "stream": True}
        ).encode()
        head = "POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        request = f"{head}content-length: {len(body)}\r\n\r\n".encode() + body
        received = bytearray()
        began = time.perf_counter()
        self._socket.sendall(request)
        first = 0.0
        while not received.endswith(_LAST):
            piece = self._socket.recv(1 << 18)
            assert piece, "the server closed the connection"
            received += piece
            if not first and b"data: " in received:
                first = time.perf_counter() - began
        seconds = time.perf_counter() - began
        assert received.startswith(b"HTTP/1.1 200 "), bytes(received[:200])
        assert b"data: [DONE]" in received, bytes(received[-300:])
        return first, seconds, received.count(b'"content":"w')


@contextlib.contextmanager
def both() -> Iterator[tuple[Streams, Streams]]:
    """agentd with a loaded stub that answers at once, and the bare server beside it."""
    port = free_port()
    with fleet(stub_environment()) as private, Child([sys.executable, BASELINE, str(port)]):
        private.start_controlplane()
        private.start_node(NODE)
        private.apply(stub_model(MODEL, private.folder), deployment(MODEL, replicas=1, warm=1))
        private.await_ready(MODEL, 1, warm=True)
        wait_until(lambda: accepts("127.0.0.1", port), "the bare server listens")
        ours, bare = Streams(private.local_api(NODE)), Streams(f"http://127.0.0.1:{port}")
        try:
            yield ours, bare
        finally:
            ours.close()
            bare.close()


def commands() -> list[str]:
    """What was run."""
    return ["POST /v1/chat/completions of agentd, stream, stub backend", f"python bench/{BASELINE.name} PORT"]
