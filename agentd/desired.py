"""The desired state: what may replace it (a pure judgement), and its one owner in the daemon."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Set
from dataclasses import dataclass

from google.protobuf.message import DecodeError

from agentd.store.desired import DesiredStore, StoredState
from slmfleet import logs
from slmfleet.v1 import state_pb2 as pb

log = logs.get(__name__)

# What DesiredState.required_features may name. An agentd that lacks one must refuse the whole document.
FEATURES: frozenset[str] = frozenset({"agents", "prefetch"})


@dataclass(frozen=True, slots=True)
class Accept:
    """Store it, then act on it."""

    state: StoredState


@dataclass(frozen=True, slots=True)
class AlreadyStored:
    """The same document again."""


@dataclass(frozen=True, slots=True)
class Refuse:
    """Keep what is stored; ``conflict``: the histories do not fit, an operator must decide."""

    reason: str
    conflict: bool = False


def judge(stored: StoredState | None, offered: pb.DesiredState, features: Set[str]) -> Accept | AlreadyStored | Refuse:
    """What to do with an offered desired state."""
    if hashlib.sha256(offered.document).digest() != offered.sha256:
        return Refuse("the document does not match its SHA-256")
    lacking = sorted(set(offered.required_features) - set(features))
    if lacking:
        return Refuse(f"this agentd lacks the features {', '.join(lacking)}: update it")
    try:
        pb.NodeDocument.FromString(offered.document)
    except DecodeError:
        return Refuse("the document can't be decoded")
    if stored is not None and offered.timeline == stored.timeline:
        if offered.generation < stored.generation:
            return Refuse(f"generation {offered.generation} is older than {stored.generation}, which is stored here")
        if offered.generation == stored.generation:
            if offered.sha256 == stored.sha256:
                return AlreadyStored()
            return Refuse(
                f"generation {offered.generation} is stored here with another content: the server's history and the "
                "node's do not fit",
                conflict=True,
            )
    return Accept(StoredState(offered.timeline, offered.generation, offered.sha256, offered.document))


class DesiredOwner:
    """Holds the newest stored desired state."""

    def __init__(self, store: DesiredStore, stored: StoredState | None) -> None:
        self._store = store
        self._changed: Callable[[], None] = lambda: None
        self._lock = asyncio.Lock()
        self.stored = stored
        self.document = pb.NodeDocument.FromString(stored.document) if stored else None
        # Why this node holds still; "" when it does not.
        self.conflict = ""

    @property
    def generation(self) -> int:
        """Generation of the stored state; 0 = none."""
        return self.stored.generation if self.stored else 0

    def on_change(self, changed: Callable[[], None]) -> None:
        """Call ``changed`` after each durable change."""
        self._changed = changed

    async def offer(self, offered: pb.DesiredState) -> Accept | AlreadyStored | Refuse:
        """Judge and, when accepted, store durably; only then is the answer Accept."""
        async with self._lock:
            verdict = judge(self.stored, offered, FEATURES)
            match verdict:
                case Accept(state):
                    await self._store.save(state)
                    self.stored = state
                    self.document = pb.NodeDocument.FromString(state.document)
                    self.conflict = ""
                    log.info("desired state stored", timeline=state.timeline, generation=state.generation,
                             assignments=len(self.document.assignments))  # fmt: skip
                    self._changed()
                case AlreadyStored():
                    self.conflict = ""
                case Refuse(reason, conflict):
                    self.conflict = reason if conflict else self.conflict
                    log.warning("desired state refused", generation=offered.generation, reason=reason)
            return verdict

    def hold(self, reason: str) -> None:
        """The server says that the histories do not fit: go on with what is stored until an operator decides."""
        self.conflict = reason or "the control plane reports a conflict"
        log.warning("conflict with the control plane: holding the stored desired state", reason=self.conflict)
