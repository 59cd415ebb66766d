"""The scheduler as owners see it."""

from __future__ import annotations

from typing import Protocol

from agentd.models.launcher import Prepared
from agentd.models.types import LoadableModel


class Broker(Protocol):
    """Holds the books of memory. Calls never block; answers come as the events Granted, Denied and Evict."""

    def want(self, model: LoadableModel, prepared: Prepared) -> None:
        """Ask for memory. Asking twice is asking once."""
        ...

    def unwant(self, model: LoadableModel) -> None:
        """Take the wish back."""
        ...

    def correct(self, model: LoadableModel, memory_bytes: int, load_seconds: float) -> None:
        """What the loaded model really takes."""
        ...

    def release(self, model: LoadableModel) -> None:
        """The memory is back."""
        ...

    def changed(self) -> None:
        """Something happened that a plan may depend on."""
        ...
