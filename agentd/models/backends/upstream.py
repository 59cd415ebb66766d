"""Any OpenAI-compatible server as a backend: Ollama, vLLM, Foundry Local, llama-server, a cloud model.

It lives in a worker like every other, so that cancellation, hang detection, limits and accounting are the same, and
nothing that a server sends is parsed in agentd's own process. The server is looked for when the model is loaded and
while it is; one that stays silent ends the worker, and the owner's back-off decides when to look again.

Requests go where the node's owner lets them: to this device, and to the addresses in ``SLMFLEET_UPSTREAM_HOSTS``.
Keys are read from files in ``SLMFLEET_UPSTREAM_KEYS``; agentd sets both.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from agentd.models.backends import upstream_answer as answers
from agentd.models.backends.base import Finish, Loaded, LoadSpec, RequestError, Sink, refuse_several
from agentd.models.backends.events_stream import EventSplitter, EventTooLarge
from agentd.models.backends.http_client import Cancelled, Exchange, Server, Unreachable, UpstreamError
from agentd.models.backends.schema import constraint
from slmfleet.modelfiles.upstream import HOSTS, KEYS, Upstream, read_upstream

_PASSED = frozenset(
    {
        *(
            "messages",
            "prompt",
            "max_tokens",
            "max_completion_tokens",
            "stop",
            "seed",
            "temperature",
            "top_p",
            "top_k",
            "min_p",
        ),
        *("response_format", "tools", "tool_choice", "parallel_tool_calls", "logprobs", "top_logprobs", "logit_bias"),
        *("presence_penalty", "frequency_penalty", "reasoning_effort"),
    }
)
_MAX_ERROR_BYTES = 65536
_MAX_LIST_BYTES = 4 * 2**20
_MAX_VECTOR_BYTES = 128 * 2**20
_MAX_KEY_BYTES = 8192
# An answer without a limit of its own may have this many tokens; a server that goes far past the limit floods.
_DEFAULT_TOKENS = 32768
_BYTES_PER_TOKEN = 4096
_HEALTH_S = 30.0
_HEALTH_FAILURES = 3


class UpstreamServer:
    """Serves a folder with ``upstream.json``."""

    def load(self, spec: LoadSpec) -> Loaded:
        self._upstream = upstream = read_upstream(spec.entry)
        _refuse_address(upstream, os.environ.get(HOSTS, ""))
        self._secret = _read_key(upstream, os.environ.get(KEYS, ""))
        self._server = Server(
            upstream.host, upstream.port, upstream.tls, upstream.is_here, upstream.connect_s, upstream.stall_s
        )
        # Loop time of the last sign of life.
        self._heard_s = 0.0
        self._failures = 0
        self._requests = 0
        self._find_model()
        self._stopped = threading.Event()
        threading.Thread(target=self._watch, name="health", daemon=True).start()
        return Loaded(slots=upstream.max_concurrent, context_tokens=upstream.context_tokens or spec.context_tokens)

    def generate(self, body: Mapping[str, Any], sink: Sink) -> Finish:
        refuse_several(body)
        answer = _Answer(sink, wants_json=constraint(body) is not None)
        tokens = body.get("max_completion_tokens") or body.get("max_tokens") or _DEFAULT_TOKENS
        answer.limit = int(tokens)
        request = {key: value for key, value in body.items() if key in _PASSED and value is not None}
        request |= {"model": self._upstream.model, "stream": True, "stream_options": {"include_usage": True}}
        try:
            with self._exchange(answer.limit * _BYTES_PER_TOKEN + 2**20, sink) as exchange:
                path = "/completions" if "prompt" in body else "/chat/completions"
                self._post(exchange, path, request, "text/event-stream")
                answer.read(exchange)
        except Cancelled:
            return answer.finish("cancelled")
        self._heard_s = time.monotonic()
        return answer.finish()

    def embed(self, inputs: Sequence[str], sink: Sink) -> tuple[list[list[float]], int]:
        try:
            with self._exchange(_MAX_VECTOR_BYTES, sink) as exchange:
                request = {"model": self._upstream.model, "input": list(inputs), "encoding_format": "float"}
                self._post(exchange, "/embeddings", request, "application/json")
                return answers.vectors(exchange.body(), len(inputs))
        except Cancelled:
            return [], 0

    def count_tokens(self, text: str) -> int:
        raise RequestError("unsupported", "an upstream model's tokens can't be counted without generating")

    def stats(self) -> Mapping[str, float]:
        return {"requests": float(self._requests), "health_failures": float(self._failures)}

    def stop(self) -> None:
        """Look after the server no longer. Connections end with the process, and with them the work there."""
        self._stopped.set()

    def _exchange(self, max_bytes: int, sink: Sink | None = None) -> Exchange:
        # A wait is progress here: the silence of the server has its own limit, and it is not this worker that hangs.
        tick = (lambda: sink.progress(1)) if sink is not None else (lambda: False)
        return Exchange(self._server, max_bytes, tick)

    def _headers(self) -> dict[str, str]:
        return {"authorization": f"Bearer {self._secret}"} if self._secret else {}

    def _post(self, exchange: Exchange, path: str, request: Mapping[str, Any], content_type: str) -> None:
        """Send a request and leave ``exchange`` at the beginning of a good answer's body."""
        self._requests += 1
        data = json.dumps(request, ensure_ascii=False).encode()
        headers = {"content-type": "application/json", "accept": content_type, **self._headers()}
        try:
            exchange.send("POST", self._upstream.path + path, headers, data)
        except Unreachable as error:
            raise RequestError("upstream_unavailable", str(error), 503, 5.0) from None
        self._check(exchange, content_type)

    def _check(self, exchange: Exchange, content_type: str) -> None:
        if exchange.status != 200:
            body = b""
            for part in exchange.parts():
                body += part
                if len(body) > _MAX_ERROR_BYTES:
                    break
            raise answers.error_of(exchange.status, body, exchange.headers.get("retry-after", ""), self._secret)
        if exchange.content_type() != content_type:
            kind = exchange.content_type()[:60] or "nothing"
            raise UpstreamError(f"the upstream answers with {kind} where {content_type} was expected")

    def _find_model(self) -> None:
        """Ask which models there are. Raises UpstreamError if ours is not among them."""
        with self._exchange(_MAX_LIST_BYTES) as exchange:
            exchange.send("GET", self._upstream.path + "/models", {"accept": "application/json", **self._headers()})
            try:
                self._check(exchange, "application/json")
            except RequestError as error:
                raise UpstreamError(error.message) from None
            names = answers.models(exchange.body())
        if self._upstream.model not in names:
            some = ", ".join(name[:80] for name in names[:10] if name.isprintable()) or "none"
            raise UpstreamError(f"{self._server} has no model {self._upstream.model!r}; it has: {some}")
        self._heard_s = time.monotonic()

    def is_silent(self) -> bool:
        """Look for the model once; True if that failed so often in a row that the server counts as gone."""
        try:
            self._find_model()
            self._failures = 0
        except UpstreamError as error:
            self._failures += 1
            print(f"health check: {error}", file=sys.stderr, flush=True)
        return self._failures >= _HEALTH_FAILURES

    def _watch(self) -> None:
        """Look after the server; end this process when it is gone for good."""
        while not self._stopped.wait(_HEALTH_S):
            # One that answered a request lately need not be asked.
            if time.monotonic() - self._heard_s >= _HEALTH_S and self.is_silent():
                os._exit(1)


class _Answer:
    """Reads one stream of chunks."""

    def __init__(self, sink: Sink, wants_json: bool) -> None:
        self._sink = sink
        self._text: list[str] | None = [] if wants_json else None
        self._reason = ""
        self._usage: Mapping[str, Any] = {}
        self._pieces = 0
        self._started_s = self._useful_s = time.monotonic()
        self._first_s = 0.0
        self.limit = 0

    def read(self, exchange: Exchange) -> None:
        """Pass the stream on until its end. Raises UpstreamError, Cancelled."""
        splitter = EventSplitter()
        try:
            for part in exchange.parts(lambda: time.monotonic() - self._useful_s):
                for data in splitter.feed(part):
                    if data.strip() == b"[DONE]":
                        return
                    self._take(answers.parse(data, "chunk"))
        except EventTooLarge as error:
            raise UpstreamError(f"the upstream floods: {error}") from None
        if not self._reason:
            raise UpstreamError("the upstream's answer broke off before its end")

    def _take(self, event: Mapping[str, Any]) -> None:
        delta, reason, logprobs = answers.choice_of(event)
        if isinstance(usage := event.get("usage"), dict):
            self._usage = usage
        self._reason = reason or self._reason
        if not delta and not reason:
            return
        self._useful_s = time.monotonic()
        if not delta:
            return
        self._first_s = self._first_s or self._useful_s
        self._pieces += 1
        # Some servers cut a token into two pieces; none into many.
        if self._pieces > 2 * self.limit + 64:
            raise UpstreamError(f"the upstream floods: it does not stop at {self.limit} tokens")
        if self._text is not None:
            self._text.append(delta.get("content", ""))
        plain = delta.keys() == {"content"}
        cancelled = self._sink.text(delta["content"], 1, logprobs) if plain else self._sink.delta(delta, 1, logprobs)
        if cancelled:
            raise Cancelled

    def finish(self, reason: str = "") -> Finish:
        """What the stream came to. Raises UpstreamError for an answer that is not of the form that was asked for."""
        reason = reason or self._reason or "stop"
        if self._text is not None and reason == "stop":
            answers.parse_any("".join(self._text))
        ended_s = time.monotonic()
        first_s = self._first_s or ended_s
        details = self._usage.get("prompt_tokens_details")
        return Finish(
            reason,
            prompt_tokens=answers.count(self._usage.get("prompt_tokens")),
            output_tokens=answers.count(self._usage.get("completion_tokens")) or self._pieces,
            cached_tokens=answers.count(details.get("cached_tokens")) if isinstance(details, dict) else 0,
            prefill_s=first_s - self._started_s,
            decode_s=ended_s - first_s,
        )


def _refuse_address(upstream: Upstream, allowed: str) -> None:
    """Raise ValueError unless the node's owner lets requests go there."""
    if not upstream.is_here and upstream.address not in allowed.split(","):
        raise ValueError(
            f"{upstream.address} is not on this device, and agentd's `upstream_hosts` does not name it: what is said "
            "here may not go there"
        )
    if upstream.key and not upstream.tls and not upstream.is_here:
        raise ValueError(f"a key is never sent to {upstream.address} in the clear: use https://")


def _read_key(upstream: Upstream, folder: str) -> str:
    """The key, "" if the server wants none. Raises ValueError, which never quotes it."""
    if not upstream.key:
        return ""
    if not folder:
        raise ValueError(f"the upstream wants the key {upstream.key!r}, and this node has no folder of keys")
    path = Path(folder) / upstream.key
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_KEY_BYTES + 1)
    except OSError as error:
        raise ValueError(f"cannot read the upstream's key {path}: {error.strerror}") from None
    key = data.decode("ascii", errors="replace").strip()
    if not key or len(data) > _MAX_KEY_BYTES or not key.isascii() or not key.isprintable() or " " in key:
        raise ValueError(f"{path} holds no key: it must be one line of printable characters")
    return key
