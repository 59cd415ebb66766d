"""Failures of one model in a row: how long it must rest, and when somebody should look."""

from __future__ import annotations

from collections.abc import Sequence

from agentd.models import admission
from agentd.models.settings import BackoffSettings

_LINES = 5


class Failures:
    """Owned by the model's owner."""

    def __init__(self, settings: BackoffSettings) -> None:
        self._settings = settings
        self.count = 0
        self.until_s = 0.0
        # The last words of the worker that failed last, oldest first.
        self.lines: tuple[str, ...] = ()

    @property
    def degraded(self) -> bool:
        """It failed so often in a row that somebody should look."""
        return self.count >= self._settings.degraded_after

    def add(self, reason: str, lines: Sequence[str], now_s: float) -> str:
        """It failed once more; the reason as it is shown."""
        self.count += 1
        self.until_s = now_s + admission.backoff_s(self.count, self._settings)
        self.lines = tuple(lines)[-_LINES:]
        return f"{reason} ({self.count} times in a row)" if self.degraded else reason

    def succeeded(self) -> None:
        """It served a request."""
        self.count = 0
        self.lines = ()
