"""The scheduler as owners see it."""

from __future__ import annotations

from typing import Protocol

from agentd.models.launcher import Prepared
from agentd.models.types import LoadableModel


class Broker(Protocol):
    """Holds the books of memory. Calls never block; answers come as the events Granted, Denied and Evict."""

    def want(self, model: LoadableModel, prepared: Prepared, wish: int) -> None:
        """Ask for memory. ``wish`` numbers the answer; a new wish takes the place of an older one."""
        ...

    def unwant(self, model: LoadableModel) -> None:
        """Take the wish back, and the grant with it if that is on its way."""
        ...

    def taken(self, model: LoadableModel) -> None:
        """The grant is in use from now on, until ``release``."""
        ...

    def correct(self, model: LoadableModel, memory_bytes: int, load_seconds: float) -> None:
        """What the loaded model really takes."""
        ...

    def release(self, model: LoadableModel) -> None:
        """The memory is back."""
        ...

    def declined(self, model: LoadableModel) -> None:
        """The model was asked to go and does not: somebody uses it."""
        ...

    def changed(self) -> None:
        """Something happened that a plan may depend on."""
        ...
