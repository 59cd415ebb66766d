"""Brings desired states and operations to the nodes that are connected here.

One loop for all sessions: it asks the database where it stands with the nodes that a hint named, and with every
connected node each ``period_s``, and compares that with what each session knows (``history.compare``). So a lost hint
costs seconds, and ten thousand idle sessions cost a few queries a period.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Iterable, Iterator

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from controlplane.db import sessions
from controlplane.db.engine import Hints
from controlplane.node_api import messages
from controlplane.node_api.history import Hold, Send, Version, compare
from controlplane.node_api.links import SUPERSEDED, NodeLinks
from controlplane.node_api.recorder import Recorder
from controlplane.node_api.session import GONE, Session
from slmfleet import logs
from slmfleet.v1 import session_pb2

log = logs.get(__name__)

_TOPIC = "node:"
# Hints that arrive together are answered together.
_GATHER_S = 0.01
_RETRY_S = 1.0
# Nodes a query, and documents in memory at once.
_HEADS_AT_ONCE = 2000
_DOCUMENTS_AT_ONCE = 100


class Distributor:
    """Compares the database with the sessions, and sends what is missing."""

    def __init__(
        self, engine: AsyncEngine, hints: Hints, links: NodeLinks, recorder: Recorder, *, period_s: float = 5.0
    ) -> None:
        self._engine = engine
        self._links = links
        self._recorder = recorder
        self._period_s = period_s
        self._named: set[str] = set()
        self._wake = asyncio.Event()
        hints.subscribe(self._on_hint)

    def look(self, node_id: str) -> None:
        """Look at this node now."""
        self._named.add(node_id)
        self._wake.set()

    async def run(self) -> None:
        """Distribute until cancelled."""
        loop = asyncio.get_running_loop()
        next_full = loop.time()
        while True:
            try:
                async with asyncio.timeout_at(next_full):
                    await self._wake.wait()
                await asyncio.sleep(_GATHER_S)
            except TimeoutError:
                next_full = loop.time() + self._period_s
                self._named |= self._links.connected()
                await self._guarded(self._expire())
            self._wake.clear()
            named, self._named = self._named, set()
            if not await self._guarded(self.distribute(named & self._links.connected())):
                self._named |= named
                await asyncio.sleep(_RETRY_S)

    async def distribute(self, node_ids: Iterable[str]) -> None:
        """One pass over these nodes."""
        for some in _chunks(sorted(node_ids), _HEADS_AT_ONCE):
            async with self._engine.connect() as connection:
                heads = await sessions.heads(connection, some)
                operations = await sessions.pending_operations(connection, some)
            lacking = [node_id for node_id in some if self._lacks_state(node_id, heads.get(node_id))]
            for operation in operations:
                self._deliver(operation)
            for few in _chunks(lacking, _DOCUMENTS_AT_ONCE):
                async with self._engine.connect() as connection:
                    await self._send_documents(connection, few)

    async def _guarded(self, work: Awaitable[None]) -> bool:
        try:
            await work
        except (OSError, sa.exc.InterfaceError, sa.exc.OperationalError, sa.exc.TimeoutError) as error:
            log.warning("cannot read desired states, will try again", error=error)
        except Exception:
            # Edge of the loop: sessions must go on.
            log.error("distribution failed", exc_info=True)
        else:
            return True
        return False

    def _lacks_state(self, node_id: str, head: sessions.NodeHead | None) -> bool:
        """Whether the node must be sent its desired state. Ends what may not go on; tells a node to hold still."""
        if head is None or head.revoked:
            self._links.drop(node_id, GONE)
            return False
        session = self._links.session(node_id)
        if session is None:
            return False
        if head.epoch is not None and head.epoch > session.epoch:
            session.end(SUPERSEDED)
            return False
        server = None
        if head.timeline is not None and head.generation is not None and head.sha256 is not None:
            server = Version(head.timeline, head.generation, head.sha256)
        match compare(session.held, server):
            case Send(version):
                return session.told != version
            case Hold(version, reason):
                self._hold(session, version, reason)
        return False

    def _hold(self, session: Session, version: Version, reason: str) -> None:
        if session.told == version:
            return
        session.told = version
        log.warning("desired states conflict", node=session.name, reason=reason)
        self._recorder.event(session.name, "error", "DesiredStateConflict", reason)
        conflict = session_pb2.Conflict(timeline=version.timeline, generation=version.generation, reason=reason)
        session.send(session_pb2.Down(conflict=conflict))

    def _deliver(self, operation: sessions.OperationRow) -> None:
        session = self._links.session(operation.node_id)
        if session is not None and operation.id not in session.delivered:
            session.delivered.add(operation.id)
            session.send(messages.operation(operation))

    async def _send_documents(self, connection: AsyncConnection, node_ids: list[str]) -> None:
        for row in await sessions.documents(connection, node_ids):
            session = self._links.session(row.node_id)
            if session is not None:
                session.told = Version(row.timeline, row.generation, row.sha256)
                session.send(messages.desired_state(row))
                log.info("desired state sent", node=session.name, generation=row.generation)

    async def _expire(self) -> None:
        async with self._engine.begin() as connection:
            await sessions.expire_operations(connection)

    def _on_hint(self, topic: str) -> None:
        if topic.startswith(_TOPIC):
            node_id = topic.removeprefix(_TOPIC)
            if node_id in self._links.connected():
                self.look(node_id)
        elif not topic:
            self._named |= self._links.connected()
            self._wake.set()


def _chunks(items: list[str], size: int) -> Iterator[list[str]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
