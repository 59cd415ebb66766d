"""An unloaded model's way to memory: its files are read, then the planner is asked. Owned by the model's owner."""

from __future__ import annotations

from collections.abc import Callable

from agentd.models.broker import Broker
from agentd.models.launcher import Prepared
from agentd.models.types import LoadableModel


class Claim:
    """At most one question is open at a time. ``read`` starts the reader of the files; its answer comes as an event."""

    def __init__(self, broker: Broker, read: Callable[[LoadableModel], None]) -> None:
        self._broker = broker
        self._read = read
        # The number of the newest wish: an answer to an older one counts for nothing.
        self._number = 0
        self.prepared: Prepared | None = None
        # The reader or the planner was asked, and has not answered.
        self.open = False

    def ask(self, model: LoadableModel) -> None:
        """Take the next step: read the files, then ask for memory."""
        if self.open:
            return
        self.open = True
        if self.prepared is None:
            self._read(model)
        else:
            self._number += 1
            self._broker.want(model, self.prepared, self._number)

    def drop(self, model: LoadableModel) -> None:
        """Nobody wants the model any more. A reader that was asked answers all the same."""
        if self.open and self.prepared is not None:
            self.open = False
            self._broker.unwant(model)

    def forget(self, model: LoadableModel) -> None:
        """What was read of the files is old. An answer of the planner to it is of no use; the reader's one is told
        from a new one by the model that it was asked for."""
        self.drop(model)
        self.prepared = None

    def answers(self, number: int) -> bool:
        """True if a planner's answer is the one that is waited for; it then is so no more."""
        waited_for = self.open and self.prepared is not None and number == self._number
        if waited_for:
            self.open = False
        return waited_for
