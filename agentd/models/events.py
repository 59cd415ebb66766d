"""What can arrive in an owner's inbox. ``serial`` names the worker that an event is about: those of an earlier worker
are dropped."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from agentd.models.launcher import Prepared
from agentd.models.process import Exit, Worker
from agentd.models.ticket import Ticket
from agentd.models.types import LoadableModel
from slmfleet.v1 import worker_pb2


@dataclass(frozen=True, slots=True)
class Submit:
    """A request."""

    ticket: Ticket


@dataclass(frozen=True, slots=True)
class Abandon:
    """The caller left."""

    ticket: Ticket


@dataclass(frozen=True, slots=True)
class Configure:
    """The desired state names the model (again)."""

    model: LoadableModel


@dataclass(frozen=True, slots=True)
class Close:
    """The desired state no longer names the model: finish what runs, unload, end."""


@dataclass(frozen=True, slots=True)
class Hold:
    """Somebody wants it loaded now; ``answer`` gets None, or the exception that says why not."""

    answer: asyncio.Future[None]


@dataclass(frozen=True, slots=True)
class Unload:
    """Somebody wants it unloaded as soon as nobody uses it; ``answer`` as in Hold."""

    answer: asyncio.Future[None]


@dataclass(frozen=True, slots=True)
class Prepare:
    """The files of ``model`` were read, or ``error`` says why they are none."""

    model: LoadableModel
    prepared: Prepared | None
    error: str = ""


@dataclass(frozen=True, slots=True)
class Granted:
    """The planner gives the memory that wish number ``wish`` asked for."""

    wish: int


@dataclass(frozen=True, slots=True)
class Denied:
    """The planner can't give the memory, and waiting would not help."""

    wish: int
    reason: str


@dataclass(frozen=True, slots=True)
class Evict:
    """The planner asks an idle model to go."""

    reason: str


@dataclass(frozen=True, slots=True)
class Yield:
    """Others have waited long: finish what runs, then go, although more requests wait. They get the next worker."""

    reason: str


@dataclass(frozen=True, slots=True)
class Retune:
    """Threads or slots of the next load changed."""


@dataclass(frozen=True, slots=True)
class Spawned:
    """The process runs and is connected."""

    serial: int
    worker: Worker


@dataclass(frozen=True, slots=True)
class SpawnFailed:
    """No process could be made."""

    serial: int
    reason: str


@dataclass(frozen=True, slots=True)
class Replied:
    """The worker said something other than a piece of an answer."""

    serial: int
    reply: worker_pb2.WorkerReply


@dataclass(frozen=True, slots=True)
class Exited:
    """The worker is gone, and with it its memory."""

    serial: int
    exit: Exit


@dataclass(frozen=True, slots=True)
class Tick:
    """A deadline that the owner set itself has come."""


@dataclass(frozen=True, slots=True)
class Probe:
    """Is the owner alive? It answers at once."""

    answer: asyncio.Future[None]


Event = (
    Submit | Abandon | Configure | Close | Hold | Unload | Prepare | Granted | Denied | Evict | Spawned | SpawnFailed
    | Replied | Exited | Tick | Probe | Yield | Retune
)  # fmt: skip

# What comes from callers, and so without bound: refused when an inbox is full. All else is always taken, since a lost
# end of a worker, or a lost grant, would be waited for without end.
FROM_OUTSIDE = (Submit, Hold, Unload, Probe)
