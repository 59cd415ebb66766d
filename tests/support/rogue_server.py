"""An OpenAI-compatible server that behaves as the last message of a request says: well, or badly in one way."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from typing import Any

MODEL = "some-model"
_OK = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def _event(content: Any, reason: str | None = None, **more: Any) -> bytes:
    choice = {"index": 0, "delta": {"content": content} if content is not None else {}, "finish_reason": reason}
    return b"data: " + json.dumps({"choices": [choice], **more}).encode() + b"\n\n"


def _chunk(data: bytes) -> bytes:
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


def _plain(status: str, body: Any, *headers: str, kind: str = "application/json") -> bytes:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"HTTP/1.1 {status}", f"Content-Type: {kind}", f"Content-Length: {len(data)}", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + data


def _error(status: str, message: str, *headers: str, **more: Any) -> bytes:
    return _plain(status, {"error": {"message": message, **more}}, *headers)


class RogueServer:
    """Use as a context manager. ``requests``: what was asked, without GET; ``gone``: set when a client hung up."""

    def __init__(self, models: tuple[str, ...] = (MODEL,)) -> None:
        self.models = models
        self.requests: list[dict[str, Any]] = []
        self.headers: list[str] = []
        self.gone = threading.Event()
        self._stop = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(0.1)
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}/v1"
        self._accepting = threading.Thread(target=self._accept, name="rogue", daemon=True)

    def __enter__(self) -> RogueServer:
        self._accepting.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop listening; connections end."""
        self._stop.set()
        if self._accepting.is_alive():
            self._accepting.join()
        self._listener.close()

    def _accept(self) -> None:
        while not self._stop.is_set():
            try:
                connection, _ = self._listener.accept()
            except TimeoutError:
                continue
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        connection.settimeout(20)
        with connection:
            try:
                head, body = self._read(connection)
                for data in self._answer(head, body):
                    connection.sendall(data)
            except OSError:
                self.gone.set()

    def _read(self, connection: socket.socket) -> tuple[str, bytes]:
        data = b""
        while b"\r\n\r\n" not in data:
            data += connection.recv(65536)
        head, _, body = data.partition(b"\r\n\r\n")
        lines = head.decode().split("\r\n")
        length = next((int(line[15:]) for line in lines if line.lower().startswith("content-length:")), 0)
        while len(body) < length:
            body += connection.recv(65536)
        self.headers = lines
        self._connection = connection
        return lines[0], body

    def _answer(self, head: str, body: bytes) -> Iterator[bytes]:
        if head.startswith("GET /v1/models "):
            yield _plain("200 OK", {"object": "list", "data": [{"id": name} for name in self.models]})
            return
        request = json.loads(body)
        self.requests.append(request)
        if head.startswith("POST /v1/embeddings "):
            yield from self._vectors(request["input"])
            return
        if head.startswith("POST /v1/completions "):
            choice = {"index": 0, "text": request["prompt"] + " a time", "finish_reason": "stop"}
            yield _OK + _chunk(b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\n") + b"0\r\n\r\n"
            return
        said = request["messages"][-1]["content"]
        if said == "good":
            yield _OK + _chunk(b": hello\n\n" + _event("one ")) + _chunk(_event("two"))
            yield _chunk(_event(None, "stop")) + _chunk(
                _event(None, usage={"prompt_tokens": 9, "completion_tokens": 2})
            )
            yield _chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n"
        elif said == "crumbs":
            # A stream that arrives byte by byte is the same stream.
            for byte in _OK + _chunk(_event("one ") + _event("two", "stop") + b"data: [DONE]\r\n\r\n") + b"0\r\n\r\n":
                yield bytes([byte])
        else:
            yield from self._misbehave(said)

    def _misbehave(self, how: str) -> Iterator[bytes]:
        match how:
            case "hang":
                self._until_gone()
            case "hang midway":
                yield _OK + _chunk(_event("one "))
                self._until_gone()
            case "comments":
                yield _OK
                while not self._stop.wait(0.1):
                    yield _chunk(b": wait\n\n")
            case "comment flood":
                yield _OK
                while not self._stop.is_set():
                    yield _chunk(b": wait\n\n" * 64)
            case "flood":
                yield _OK
                while not self._stop.is_set():
                    yield _chunk(_event("word ") * 64)
            case "endless line":
                yield _OK
                while not self._stop.is_set():
                    yield _chunk(b"data: " + b"x" * 65536)
            case "endless header":
                yield b"HTTP/1.1 200 OK\r\n"
                while not self._stop.is_set():
                    yield b"X-More: " + b"x" * 1000 + b"\r\n"
            case "dies":
                yield _OK + _chunk(_event("one ")) + b"40\r\ndata: {"
            case "ends early":
                yield _OK + _chunk(_event("one ")) + b"0\r\n\r\n"
            case "no http":
                yield b"SSH-2.0-OpenSSH_9.2\r\n"
            case "nothing":
                return
            case "html":
                yield _plain("200 OK", b"<html>login</html>", kind="text/html")
            case "bad json":
                yield _OK + _chunk(b"data: {oops\n\n")
            case "bad delta":
                yield _OK + _chunk(_event(5))
            case "error event":
                yield _OK + _chunk(b'data: {"error": {"message": "cuda is gone"}}\n\n')
            case "redirect":
                yield _plain("302 Found", b"", "Location: http://169.254.169.254/latest/")
            case "401":
                yield _error("401 Unauthorized", "Incorrect API key provided: sk-secret")
            case "400":
                yield _error("400 Bad Request", "no: sk-secret said \x1b[31mred\x1b[0m")
            case "429":
                yield _error("429 Too Many Requests", "slow down", "Retry-After: 7")
            case "500":
                yield _error("500 Internal Server Error", "oops")
            case "context":
                yield _error(
                    "400 Bad Request", "too long", type="exceed_context_size_error", n_prompt_tokens=9, n_ctx=8
                )

    def _until_gone(self) -> None:
        if not self._connection.recv(1):
            self.gone.set()

    def _vectors(self, inputs: list[str]) -> Iterator[bytes]:
        items = [{"index": number, "embedding": [float(len(text)), 1]} for number, text in enumerate(inputs)]
        match inputs[0]:
            case "few":
                items = []
            case "nan":
                items[0]["embedding"] = [float("nan")]
            case "twice":
                items[1]["index"] = 0
        yield _plain("200 OK", {"data": list(reversed(items)), "usage": {"prompt_tokens": 4}})
