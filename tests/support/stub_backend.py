"""A backend without a model, for tests and benchmarks of everything around it: real worker, real frames.

Its model is a JSON file::

    {"load_s": 0.1, "tokens_per_s": 100, "prefill_tokens_per_s": 10000, "slots": 1, "memory_bytes": 0,
     "memory_per_request": 0, "fail": "", "after_tokens": 3}

``tokens_per_s`` 0 means: as fast as possible. ``fail``: ``load`` (cannot be loaded), ``late`` (is never loaded),
``dead`` (kills itself after so many tokens), ``hung`` (stops there for ever, deaf to cancellation), ``error`` (that
request fails). The answer to ``hello`` is ``w0 w1 w2 ...`` up to ``max_tokens``; a prompt token is a word. A request
whose last message is a JSON object takes its keys over those of the file.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from agentd.models.backends.base import Finish, Loaded, LoadSpec, RequestError, Sink, context_exceeded

BACKEND = "tests.support.stub_backend:StubBackend"
FORMAT = "stub"


def host_options() -> dict[str, Any]:
    """What HostSettings needs in order to know the format ``stub``."""
    root = str(Path(__file__).parents[2])
    return {"backends": {FORMAT: BACKEND}, "worker_environment": {"PYTHONPATH": root}}


def write_stub(path: Path, **options: Any) -> Path:
    """Write a stub's model file."""
    path.write_text(json.dumps(options))
    return path


class StubBackend:
    """See the module's text."""

    def load(self, spec: LoadSpec) -> Loaded:
        self._options = json.loads(spec.entry.read_text())
        self._context = spec.context_tokens
        if self._options.get("fail") == "load":
            raise ValueError("this stub was told to fail")
        self._ballast = [bytearray(b"x") * self._options.get("memory_bytes", 0)]
        if self._options.get("fail") == "late":
            threading.Event().wait()
        time.sleep(self._options.get("load_s", 0.0))
        return Loaded(slots=self._options.get("slots", spec.slots), context_tokens=spec.context_tokens)

    def generate(self, body: Mapping[str, Any], sink: Sink) -> Finish:
        messages = body.get("messages") or [{"content": body["prompt"]}]
        content = messages[-1]["content"]
        options = {**self._options, **(json.loads(content) if content.startswith("{") else {})}
        prompt = sum(len(str(message["content"]).split()) for message in messages)
        if prompt >= self._context:
            raise context_exceeded(prompt, self._context)
        self._ballast.append(bytearray(b"x") * self._options.get("memory_per_request", 0))
        started = time.monotonic()
        for _ in range(0, prompt, 128):
            time.sleep(min(128, prompt) / options.get("prefill_tokens_per_s", 1e6))
            if sink.progress(min(128, prompt)):
                return Finish("cancelled", prompt, 0)
        prefilled = time.monotonic()
        count, limit = 0, int(body.get("max_tokens") or 16)
        pause = 1 / options["tokens_per_s"] if options.get("tokens_per_s") else 0.0
        while count < limit:
            if options.get("fail") and count >= options.get("after_tokens", 3):
                _fail(options["fail"])
            if pause:
                time.sleep(pause)
            count += 1
            if sink.text(f"w{count - 1} "):
                return Finish("cancelled", prompt, count)
        decoded = time.monotonic() - prefilled
        return Finish("length", prompt, count, prefill_s=prefilled - started, decode_s=decoded)

    def embed(self, inputs: Sequence[str], sink: Sink) -> tuple[list[list[float]], int]:
        return [[float(len(text)), 1.0] for text in inputs], sum(len(text.split()) for text in inputs)

    def count_tokens(self, text: str) -> int:
        return len(text.split())

    def stats(self) -> Mapping[str, float]:
        return {"answer": 42.0}

    def stop(self) -> None:
        """Nothing to let go of."""


def _fail(how: str) -> None:
    match how:
        case "dead":
            os.kill(os.getpid(), signal.SIGKILL)
        case "hung":
            threading.Event().wait()
        case "error":
            raise RuntimeError("this stub was told to fail")
        case "unfit":
            raise RequestError("invalid_request", "this stub was told to refuse")
