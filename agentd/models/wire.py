"""Frames between agentd and a worker: a 4-byte big-endian length, then one protobuf message (worker.proto).

``FrameSplitter`` is the protocol without I/O, used on both sides; ``FrameProtocol`` binds it to asyncio on agentd's.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Callable
from typing import Protocol

# Bounds what a broken or hostile peer can make us allocate. A prompt that fills a 128k context is about 1 MiB.
MAX_FRAME_BYTES = 16 * 2**20
# Unsent bytes towards a worker that does not read; past this the worker is considered stuck.
MAX_UNSENT_BYTES = 4 * MAX_FRAME_BYTES
_LENGTH = struct.Struct(">I")


class FrameTooLarge(Exception):
    """A message is longer than MAX_FRAME_BYTES."""


class Serializable(Protocol):
    """What of a protobuf message is needed here."""

    def SerializeToString(self) -> bytes: ...


def encode(message: Serializable) -> bytes:
    """The frame of ``message``. Raises FrameTooLarge."""
    payload = message.SerializeToString()
    if len(payload) > MAX_FRAME_BYTES:
        raise FrameTooLarge(
            f"a message of {len(payload)} bytes exceeds the {MAX_FRAME_BYTES} bytes that a frame may have"
        )
    return _LENGTH.pack(len(payload)) + payload


class FrameSplitter:
    """Bytes in, payloads of whole frames out."""

    def __init__(self) -> None:
        self._pending = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """Payloads of the frames that are complete after ``data``. Raises FrameTooLarge."""
        self._pending += data
        pending, frames, start = self._pending, [], 0
        while len(pending) - start >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(pending, start)
            if length > MAX_FRAME_BYTES:
                raise FrameTooLarge(f"the peer announced a frame of {length} bytes; {MAX_FRAME_BYTES} are allowed")
            end = start + _LENGTH.size + length
            if len(pending) < end:
                break
            frames.append(bytes(pending[start + _LENGTH.size : end]))
            start = end
        if start:
            del pending[:start]
        return frames


class FrameProtocol(asyncio.Protocol):
    """agentd's end of the socket pair: calls ``on_frame`` with each payload and ``on_closed`` once."""

    def __init__(self, on_frame: Callable[[bytes], None], on_closed: Callable[[str], None]) -> None:
        self._on_frame = on_frame
        self._on_closed = on_closed
        self._splitter = FrameSplitter()
        self._transport: asyncio.Transport | None = None
        self._error = ""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        try:
            for payload in self._splitter.feed(data):
                self._on_frame(payload)
        except FrameTooLarge as error:
            self._fail(str(error))

    def connection_lost(self, exc: Exception | None) -> None:
        self._on_closed(self._error or (str(exc) if exc else ""))

    def send(self, message: Serializable) -> None:
        """Queue one message. A closed connection swallows it: its end is reported by ``on_closed``."""
        if self._transport is None or self._transport.is_closing():
            return
        self._transport.write(encode(message))
        if self._transport.get_write_buffer_size() > MAX_UNSENT_BYTES:
            self._fail("the worker does not read what it is sent")

    def close(self) -> None:
        """Drop the connection; what was not sent is lost."""
        if self._transport is not None:
            self._transport.abort()

    def _fail(self, reason: str) -> None:
        self._error = reason
        self.close()
