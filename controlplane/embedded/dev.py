"""The embedded servers of one `controlplane dev`: started before the event loop, stopped after it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from controlplane.embedded.broker import EmbeddedBroker
from controlplane.embedded.postgres import EmbeddedPostgres
from controlplane.listening import Address, first_of
from slmfleet.errors import UserError

LOOK_EVERY_S = 0.5


@dataclass(frozen=True, slots=True)
class Embedded:
    """What was started; None where an own server was given instead."""

    postgres: EmbeddedPostgres | None = None
    broker: EmbeddedBroker | None = None

    @property
    def pids(self) -> list[int]:
        """Their process ids."""
        return [server.pid for server in (self.postgres, self.broker) if server is not None]

    @property
    def changes(self) -> list[str]:
        """What the start changed on this machine outside the data folder, one sentence each; mostly nothing."""
        return self.postgres.changes if self.postgres is not None else []

    async def watch(self) -> None:
        """Runs until cancelled; raises UserError when one of them ended by itself."""
        while True:
            for name, server in (("PostgreSQL", self.postgres), ("MQTT broker", self.broker)):
                if server is not None and not server.alive():
                    raise UserError(f"the embedded {name} ended by itself: start again; its log is in the data folder")
            await asyncio.sleep(LOOK_EVERY_S)


@contextlib.contextmanager
def running(folder: Path, *, postgres: bool, broker: bool, broker_at: Sequence[Address]) -> Iterator[Embedded]:
    """Start what is wanted, PostgreSQL first, the broker at the first address that can be had (all on loopback); stop
    it in the reverse order. Blocks; use the main thread."""
    with contextlib.ExitStack() as stack:
        database = events = None
        if postgres:
            database = EmbeddedPostgres(folder / "postgres")
            stack.callback(database.stop)
            database.start()
        if broker:
            events = first_of(broker_at, lambda address: _started(EmbeddedBroker(folder / "mqtt", address[1])))
            stack.callback(events.stop)
        yield Embedded(database, events)


def _started(broker: EmbeddedBroker) -> EmbeddedBroker:
    broker.start()
    return broker
