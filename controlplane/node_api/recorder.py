"""Writes what all sessions of this process hear, in batches: one task, one transaction for everybody.

A handler of a session never waits for Postgres here: it leaves the newest fact (later ones replace earlier ones) and
goes on. Beats are written each second; everything else within ``_GATHER_S``. While Postgres is away the facts stay,
bounded by the number of sessions and assignments, and are written when it is back.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from controlplane.db import nodes, sessions
from controlplane.db.engine import hint
from slmfleet import logs

log = logs.get(__name__)

_BEAT_EVERY_S = 1.0
# Facts that arrive together are written together.
_GATHER_S = 0.02
_RETRY_S = 1.0
_MAX_RESULTS = 10_000


@dataclass(slots=True)
class _Batch:
    beats: dict[str, tuple[int, float]] = field(default_factory=dict)  # node -> (epoch, loop time)
    closed: dict[tuple[str, int], sessions.Closed] = field(default_factory=dict)
    applied: dict[str, sessions.AppliedRow] = field(default_factory=dict)
    statuses: dict[str, sessions.StatusRow] = field(default_factory=dict)
    inventoried: dict[str, sessions.Inventoried] = field(default_factory=dict)
    results: dict[str, sessions.ResultRow] = field(default_factory=dict)
    events: dict[tuple[str, str], tuple[str, str]] = field(default_factory=dict)  # (node name, reason)
    spec_changed: bool = False

    def urgent(self) -> bool:
        return bool(self.closed or self.applied or self.statuses or self.inventoried or self.results or self.events)

    def put_back(self, older: _Batch) -> None:
        """Take in what an older batch could not write; what is here is newer and stays."""
        for name in ("beats", "closed", "applied", "statuses", "inventoried", "results", "events"):
            setattr(self, name, getattr(older, name) | getattr(self, name))
        self.spec_changed |= older.spec_changed


class Recorder:
    """The one writer of what sessions hear. ``superseded(node_id, epoch)`` is called for sessions that another
    replica's newer session has fenced."""

    def __init__(self, engine: AsyncEngine, superseded: Callable[[str, int], None]) -> None:
        self._engine = engine
        self._superseded = superseded
        self._batch = _Batch()
        self._urgent = asyncio.Event()

    def heard(self, node_id: str, epoch: int, at: float) -> None:
        """The node spoke at ``at`` (event loop's clock)."""
        self._batch.beats[node_id] = (epoch, at)

    def closed(self, node_id: str, epoch: int, reason: str) -> None:
        """The session's stream is gone."""
        self._batch.closed[(node_id, epoch)] = sessions.Closed(node_id, epoch, reason)
        self._urgent.set()

    def applied(self, row: sessions.AppliedRow) -> None:
        """The node stored or refused a desired state."""
        self._batch.applied[row.node_id] = row
        self._batch.spec_changed = True
        self._urgent.set()

    def status(self, row: sessions.StatusRow, *, wake: bool) -> None:
        """The newest status of an assignment. ``wake``: it matters to controllers (not only bytes moved on)."""
        self._batch.statuses[row.assignment_id] = row
        self._batch.spec_changed |= wake
        self._urgent.set()

    def inventoried(self, row: sessions.Inventoried) -> None:
        """The node has these assignments and no others."""
        statuses = self._batch.statuses
        for key in [key for key, status in statuses.items() if _left_out(status, row)]:
            del statuses[key]
        self._batch.inventoried[row.node_id] = row
        self._batch.spec_changed = True
        self._urgent.set()

    def result(self, row: sessions.ResultRow) -> None:
        """An operation ended."""
        if len(self._batch.results) < _MAX_RESULTS:
            self._batch.results[row.operation_id] = row
        self._urgent.set()

    def event(self, name: str, severity: str, reason: str, message: str) -> None:
        """Something that people should read about the node ``name``."""
        self._batch.events[(name, reason)] = (severity, message)
        self._urgent.set()

    async def run(self) -> None:
        """Write until cancelled; what is left then is written by ``flush``."""
        loop = asyncio.get_running_loop()
        next_beats = loop.time() + _BEAT_EVERY_S
        while True:
            try:
                async with asyncio.timeout_at(next_beats):
                    await self._urgent.wait()
                await asyncio.sleep(_GATHER_S)
            except TimeoutError:
                next_beats = loop.time() + _BEAT_EVERY_S
            try:
                await self.flush()
            except (OSError, sa.exc.InterfaceError, sa.exc.OperationalError, sa.exc.TimeoutError) as error:
                log.warning("cannot write what nodes say, will try again", error=error)
                await asyncio.sleep(_RETRY_S)
            except Exception:
                # Edge of the loop. What nodes say of themselves comes again with their next report.
                log.error("lost a batch of what nodes said", exc_info=True)
                await asyncio.sleep(_RETRY_S)

    async def flush(self) -> None:
        """Write everything now. Raises what the database raises; facts survive a database that is away."""
        self._urgent.clear()
        batch, self._batch = self._batch, _Batch()
        if not batch.beats and not batch.urgent():
            return
        now = asyncio.get_running_loop().time()
        beats = [sessions.Beat(node, epoch, max(0.0, now - at)) for node, (epoch, at) in batch.beats.items()]
        try:
            async with self._engine.begin() as connection:
                alive = await sessions.record_beats(connection, beats) if beats else set()
                await _write(connection, batch)
        except (OSError, sa.exc.InterfaceError, sa.exc.OperationalError, sa.exc.TimeoutError, asyncio.CancelledError):
            self._batch.put_back(batch)
            raise
        except Exception:
            # One value that Postgres refuses must not keep a dead session open in the table.
            self._batch.put_back(_Batch(closed=batch.closed))
            raise
        for beat in beats:
            if beat.node_id not in alive:
                self._superseded(beat.node_id, beat.epoch)


def _left_out(status: sessions.StatusRow, inventory: sessions.Inventoried) -> bool:
    return status.node_id == inventory.node_id and status.assignment_id not in inventory.assignment_ids


async def _write(connection: AsyncConnection, batch: _Batch) -> None:
    # In this order: a status in the batch is newer than an inventory in it that leaves it out.
    for row in batch.inventoried.values():
        await sessions.forget_other_statuses(connection, row)
    if batch.statuses:
        await sessions.record_statuses(connection, list(batch.statuses.values()))
    if batch.applied:
        await sessions.record_applied(connection, list(batch.applied.values()))
    if batch.results:
        await sessions.record_results(connection, list(batch.results.values()))
    for (name, reason), (severity, message) in batch.events.items():
        await nodes.add_event(connection, severity, name, reason, message)
    if batch.closed:
        await sessions.close_sessions(connection, list(batch.closed.values()))
    if batch.spec_changed:
        await hint(connection, "spec")
