"""Which batches of one stream are on their way: at most as many as the server gives credit for, and when to repeat.

Pure bookkeeping; times are CLOCK_BOOTTIME seconds.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from agentd.store.outbox import SealedBatch

START_CREDIT = 8
MAX_CREDIT = 64
# A batch that the broker took but the control plane did not acknowledge is published again after this long.
REPEAT_S = 60.0


@dataclass(slots=True)
class Window:
    """Batches that were published and are not acknowledged, by id, with the time of publication."""

    credit: int = START_CREDIT
    sent: dict[int, tuple[SealedBatch, float]] = field(default_factory=dict)

    @property
    def room(self) -> bool:
        """Whether another batch may be published. One always may: a lost grant must not stop the stream for ever."""
        return len(self.sent) < max(1, self.credit)

    def publish(self, batch: SealedBatch, now_s: float) -> None:
        """This batch was handed to the broker."""
        self.sent[batch.id] = (batch, now_s)

    def due(self, now_s: float) -> list[SealedBatch]:
        """Batches to publish again."""
        return [batch for batch, sent_s in self.sent.values() if now_s - sent_s >= REPEAT_S]

    def acknowledge(self, epoch: int, ranges: Iterable[tuple[int, int]], credit: int) -> None:
        """These are committed; ``credit`` more may be on their way."""
        spans = list(ranges)
        self.sent = {
            key: (batch, sent_s)
            for key, (batch, sent_s) in self.sent.items()
            if not (batch.epoch == epoch and any(a <= batch.first and batch.last <= b for a, b in spans))
        }
        self.credit = min(credit, MAX_CREDIT)

    def forget(self) -> None:
        """The connection is new: all that is unacknowledged is published again."""
        self.sent.clear()
