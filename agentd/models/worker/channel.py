"""The worker's end of the socket pair, shared by its threads."""

from __future__ import annotations

import os
import select
import socket
import threading
from collections import deque

from agentd.models.wire import FrameSplitter, encode
from slmfleet.v1 import worker_pb2

# Messages that wait for the socket; more of them are joined where they are text of one answer.
_MOST_KEPT = 1024


class Channel:
    """Frames in (one reading thread) and out (any thread).

    A sender never waits for agentd: what the socket does not take is kept, and a thread flushes it. A long backlog is
    joined, so that it takes little more than the answers' text, which has limits of its own.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._readable = select.poll()
        self._readable.register(sock, select.POLLIN)
        self._splitter = FrameSplitter()
        self._frames: deque[bytes] = deque()
        self._lock = threading.Lock()
        self._backlog: deque[worker_pb2.WorkerReply] = deque()
        self._unsent = b""
        self._wake = threading.Condition(self._lock)
        self._flusher: threading.Thread | None = None

    def receive(self) -> worker_pb2.WorkerRequest | None:
        """The next message; None at end of file."""
        while not self._frames:
            # A plain recv() would be woken in the kernel each time agentd takes a piece of an answer off the socket.
            self._readable.poll()
            data = self._socket.recv(1 << 16)
            if not data:
                return None
            self._frames.extend(self._splitter.feed(data))
        return worker_pb2.WorkerRequest.FromString(self._frames.popleft())

    def send(self, reply: worker_pb2.WorkerReply) -> None:
        """Send now if the socket takes it, else soon."""
        with self._lock:
            if self._unsent or self._backlog:
                self._keep(reply)
                return
            data = encode(reply)
            try:
                sent = self._socket.send(data, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
            except BlockingIOError:
                sent = 0
            except OSError:
                os._exit(0)  # agentd is gone: nobody wants the rest
            if sent < len(data):
                self._unsent = data[sent:]
                self._start_flusher()

    def drain(self, timeout_s: float) -> None:
        """Wait until everything was handed to the kernel."""
        with self._wake:
            self._wake.wait_for(lambda: not self._unsent and not self._backlog, timeout_s)

    def _keep(self, reply: worker_pb2.WorkerReply) -> None:
        last = self._backlog[-1] if len(self._backlog) >= _MOST_KEPT else None
        if last is not None and last.request_id == reply.request_id and _is_text(last) and _is_text(reply):
            last.chunk.text += reply.chunk.text
            last.chunk.tokens += reply.chunk.tokens
        else:
            self._backlog.append(reply)

    def _start_flusher(self) -> None:
        if self._flusher is None:
            self._flusher = threading.Thread(target=self._flush, name="flush", daemon=True)
            self._flusher.start()
        self._wake.notify_all()

    def _flush(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._unsent or self._backlog)
                data = self._unsent = self._unsent + b"".join(map(encode, self._backlog))
                self._backlog.clear()
            try:
                self._socket.sendall(data)
            except OSError:
                os._exit(0)
            with self._wake:
                self._unsent = b""
                self._wake.notify_all()


def _is_text(reply: worker_pb2.WorkerReply) -> bool:
    return reply.WhichOneof("message") == "chunk" and not reply.chunk.delta and not reply.chunk.logprobs
