"""Server-sent events out of a stream of bytes (https://html.spec.whatwg.org/multipage/server-sent-events.html)."""

from __future__ import annotations

from collections.abc import Iterator

MAX_EVENT_BYTES = 2**20


class EventTooLarge(Exception):
    """An event is longer than MAX_EVENT_BYTES."""


class EventSplitter:
    """Splits what ``feed`` is given into the ``data`` of events. Comments and other fields are dropped."""

    def __init__(self) -> None:
        self._pending = bytearray()
        self._data: list[bytes] = []
        self._size = 0

    def feed(self, part: bytes) -> Iterator[bytes]:
        """The data of each event that is complete with ``part``. Raises EventTooLarge."""
        # Only the new bytes can hold the end of the pending line.
        searched = len(self._pending)
        self._pending += part
        start = 0
        while (end := self._pending.find(b"\n", max(start, searched))) >= 0:
            line = bytes(self._pending[start:end]).removesuffix(b"\r")
            start = end + 1
            if not line:
                if self._data:
                    yield b"\n".join(self._data)
                self._data, self._size = [], 0
            elif line.startswith(b"data:"):
                data = line[5:].removeprefix(b" ")
                self._size += len(data) + 1
                self._data.append(data)
                self._bound(self._size)
        del self._pending[:start]
        self._bound(len(self._pending))

    def _bound(self, size: int) -> None:
        if size > MAX_EVENT_BYTES:
            raise EventTooLarge(f"an event is longer than {MAX_EVENT_BYTES} bytes")
