"""Somebody at the device who calls its local API all along and notes every refusal and delay."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from tests.support.netns import Member

ANSWER_S = 10.0


@dataclass
class Asked:
    """What came of the requests."""

    answered: int = 0
    failures: list[str] = field(default_factory=list)
    slowest_s: float = 0.0


class Asker:
    """Calls ``address`` from inside ``member``'s namespace (None: from here)."""

    def __init__(self, address: tuple[str, int], member: Member | None) -> None:
        self._address = address
        self._member = member

    def status(self) -> dict[str, Any]:
        """GET /status."""
        return dict(json.loads(self._from_inside(lambda: self._exchange("GET", "/status"))))

    def ask(self, model: str) -> str:
        """The text of one short answer. Raises OSError or HTTPException when there is none."""
        return str(self._from_inside(lambda: self._chat(model)))

    def _from_inside(self, call: Any) -> Any:
        return self._member.call(call) if self._member else call()

    def _chat(self, model: str) -> str:
        body = {"model": model, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 3}
        answer = json.loads(self._exchange("POST", "/v1/chat/completions", json.dumps(body)))
        return str(answer["choices"][0]["message"]["content"])

    def _exchange(self, method: str, path: str, body: str | None = None) -> bytes:
        connection = http.client.HTTPConnection(*self._address, timeout=ANSWER_S)
        try:
            connection.request(method, path, body, {"content-type": "application/json"})
            answer = connection.getresponse()
            content = answer.read()
            if answer.status != 200:
                raise OSError(f"{path}: {answer.status} {content[:300]!r}")
            return content
        finally:
            connection.close()

    @contextmanager
    def all_along(self, model: str, pause_s: float = 0.1) -> Iterator[Asked]:
        """Ask for as long as the block runs."""
        asked, enough = Asked(), threading.Event()

        def work() -> None:
            while not enough.is_set():
                began = time.monotonic()
                try:
                    self._chat(model)
                    asked.answered += 1
                except (OSError, http.client.HTTPException, ValueError) as error:
                    asked.failures.append(f"{type(error).__name__}: {error}")
                asked.slowest_s = max(asked.slowest_s, time.monotonic() - began)
                enough.wait(pause_s)

        thread = threading.Thread(target=lambda: self._from_inside(work), name="local requests", daemon=True)
        thread.start()
        try:
            yield asked
        finally:
            enough.set()
            thread.join(2 * ANSWER_S)
