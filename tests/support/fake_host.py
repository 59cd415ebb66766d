"""A model host without models, behind the same Protocol: for tests of everything around it.

As a program (``python -m tests.support.fake_host run ...``) it is agentd with this host.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing
from typing import Any

from agentd.models.counters import ModelCounters
from agentd.models.types import (
    Chunk,
    Done,
    GenerateRequest,
    LoadableModel,
    ModelKey,
    ModelState,
    ModelStatus,
    Refused,
    Timings,
    Vectors,
)
from slmfleet import logs

log = logs.get(__name__)

WORDS = ("Hello", ",", " I", " am", " a", " fake", ".")


class FakeHost:
    """Says WORDS to everybody. Models are READY once they are warm or were used."""

    def __init__(self, settings: Any = None) -> None:
        self.models: dict[ModelKey, LoadableModel] = {}
        self.loaded: set[ModelKey] = set()
        self.requests: list[GenerateRequest] = []
        self.cancelled = 0
        # Raised by the next generations, one each; and how to answer.
        self.errors: list[Exception] = []
        self.words: Sequence[str] = WORDS
        self.deltas: list[Mapping[str, Any]] | None = None
        self.fail_after: Exception | None = None
        # Generation stops before its second word while this is clear.
        self.may_go_on = asyncio.Event()
        self.may_go_on.set()
        self.begun = asyncio.Event()
        self.trouble: dict[ModelKey, str] = {}
        self._subscribers: list[Callable[[ModelStatus], None]] = []
        self._counters: dict[ModelKey, ModelCounters] = {}
        self.running = 0
        # What ``knows_tools`` answers.
        self.tools: bool | None = None
        # Seconds before each word but the first.
        self.word_s = float(os.environ.get("FAKE_HOST_WORD_S", "0"))

    async def generate(self, request: GenerateRequest) -> AsyncIterator[Chunk | Done]:
        self.requests.append(request)
        if self.errors:
            raise self.errors.pop(0)
        if request.key not in self.models:
            raise Refused(404, "model_not_found", f"{request.key} is not here")
        self._load(request.key)
        finished = False
        self.running += 1
        try:
            deltas = self.deltas or [{"content": word} for word in self.words]
            for number, delta in enumerate(deltas):
                if number == 1:
                    self.begun.set()
                    await self.may_go_on.wait()
                    if self.fail_after is not None:
                        raise self.fail_after
                if number:
                    await asyncio.sleep(self.word_s)
                yield Chunk(delta)
            finished = True
            counters = self._counters.setdefault(request.key, ModelCounters())
            counters.requests_ok += 1
            counters.output_tokens += len(deltas)
            counters.total_s.observe(0.2)
            yield Done("stop", 11, len(deltas), timings=Timings(0.01, 0.0, 0.05, 0.1))
        finally:
            self.running -= 1
            self.cancelled += not finished
            if not finished:
                log.info("generation cancelled")

    async def bursts(self, request: GenerateRequest) -> AsyncGenerator[Sequence[Chunk | Done], None]:
        async with aclosing(self.generate(request)) as items:  # type: ignore[type-var]
            async for item in items:
                yield [item]

    async def embed(self, request: GenerateRequest, inputs: Sequence[str]) -> Vectors:
        self.requests.append(request)
        if self.errors:
            raise self.errors.pop(0)
        return Vectors([[float(len(text)), 0.5] for text in inputs], sum(len(text.split()) for text in inputs))

    async def knows_tools(self, key: ModelKey) -> bool | None:
        return self.tools

    async def load(self, key: ModelKey) -> None:
        if self.errors:
            raise self.errors.pop(0)
        self._load(key)

    async def unload(self, key: ModelKey) -> None:
        if self.models[key].warm:
            raise Refused(400, "model_kept_warm", f"{key} is kept loaded by the desired state")
        self.loaded.discard(key)

    def set_models(self, models: Sequence[LoadableModel]) -> None:
        self.models = {model.key: model for model in models}
        self.loaded &= self.models.keys()
        for model in models:
            if model.warm:
                self._load(model.key)

    def status(self) -> Sequence[ModelStatus]:
        return [
            ModelStatus(
                key,
                ModelState.BACKING_OFF if key in self.trouble
                else ModelState.READY if key in self.loaded else ModelState.UNLOADED,
                model.format, None, 0, 0, 0, self.trouble.get(key, ""), None, None, 0,
            )
            for key, model in self.models.items()
        ]  # fmt: skip

    def subscribe(self, callback: Callable[[ModelStatus], None]) -> Callable[[], None]:
        self._subscribers.append(callback)
        return lambda: self._subscribers.remove(callback)

    async def probe(self, timeout_s: float = 1.0) -> str:
        return ""

    def take_counters(self) -> Mapping[ModelKey, ModelCounters]:
        taken, self._counters = self._counters, {}
        return taken

    def tune(self, tuning: Any) -> None:
        self.tuning = tuning

    limits = "none"
    measured: Mapping[ModelKey, Any] = {}

    def remember(self, measured: Mapping[ModelKey, Any]) -> None:
        pass

    async def run(self) -> None:
        await asyncio.Event().wait()

    def _load(self, key: ModelKey) -> None:
        if key not in self.loaded:
            self.loaded.add(key)
            for status in self.status():
                for tell in self._subscribers:
                    tell(status)


def main() -> int:
    """``agentd`` with a FakeHost: put in the place where the command line looks for the real one."""
    import types

    fake = types.ModuleType("agentd.models.host")
    fake.Host = FakeHost  # type: ignore[attr-defined]
    sys.modules["agentd.models.host"] = fake
    from agentd.cli import main as agentd

    return agentd()


if __name__ == "__main__":
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    sys.exit(main())
