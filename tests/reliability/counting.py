"""The third party that checks numbers: what a node numbered, against what stands in Postgres.

A node numbers its rows 1, 2, 3, ... in each (stream, epoch); an epoch ends when the process dies. ``Numbered`` reads
the counters out of the node's own database while the node is dead, so it knows the last number of each epoch exactly.
``shortfall`` and ``surplus`` compare: every number must be in Postgres (or be told as dropped), and no row may stand
there twice, under whatever number.
"""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import asyncpg

# What agentd itself records as events; the others of a node are the control plane's.
NODE_REASONS = ("Started", "ModelCrashed", "DigestMismatch", "FetchFailed", "NotFound", "DiskFull")

Key = tuple[str, int]


class Numbered:
    """Last number given in each (stream, epoch) of one node."""

    def __init__(self, database: Path) -> None:
        self._database = database
        self.last: dict[Key, int] = {}

    def look(self) -> Mapping[Key, int]:
        """Read the counters now."""
        with contextlib.closing(sqlite3.connect(f"file:{self._database}?mode=ro", uri=True, timeout=10)) as connection:
            for stream, epoch, next_row in connection.execute("SELECT stream, epoch, next_row FROM streams"):
                self.last[(stream, epoch)] = max(next_row - 1, self.last.get((stream, epoch), 0))
        return dict(self.last)


@dataclass(frozen=True, slots=True)
class Stored:
    """What Postgres has of one node. ``missing``: sentences, [] when every number is there."""

    missing: list[str]
    rows: int
    dropped: int
    twice: list[str]


async def _stored(url: str, node_id: str, name: str, numbered: Mapping[Key, int]) -> Stored:
    connection = await asyncpg.connect(url)
    try:
        # One snapshot: rows arrive meanwhile.
        async with connection.transaction(isolation="repeatable_read", readonly=True):
            metrics = await connection.fetch(
                "SELECT epoch, count(*) AS rows, max(sequence) AS last FROM node_metrics WHERE node_id = $1 "
                "GROUP BY epoch",
                node_id,
            )
            ranges = await connection.fetch(
                "SELECT stream, epoch, sum(last - first + 1)::bigint AS numbers, max(last) AS last, "
                "sum(dropped)::bigint AS dropped FROM outbox_ranges WHERE node_id = $1 GROUP BY stream, epoch",
                node_id,
            )
            copies = await connection.fetchrow(
                "SELECT count(*) AS rows, count(DISTINCT boottime_ms) AS moments FROM node_metrics WHERE node_id = $1",
                node_id,
            )
            events = await connection.fetchrow(
                "SELECT count(*) AS rows, count(DISTINCT (at, reason, message)) AS moments FROM events "
                "WHERE object = $1 AND reason = ANY ($2)",
                f"node/{name}",
                list(NODE_REASONS),
            )
    finally:
        await connection.close()
    assert copies is not None
    assert events is not None
    by_key = {(row["stream"], row["epoch"]): row for row in ranges}
    missing = [
        f"{stream} of epoch {epoch}: {by_key[(stream, epoch)]['numbers'] if (stream, epoch) in by_key else 0} of {last}"
        for (stream, epoch), last in numbered.items()
        if (stream, epoch) not in by_key or by_key[(stream, epoch)]["numbers"] < last
    ]
    dropped = sum(row["dropped"] for row in ranges)
    twice = [f"{row['epoch']}: {row['rows']} rows up to {row['last']}" for row in metrics if row["rows"] > row["last"]]
    if copies["rows"] != copies["moments"]:
        twice.append(f"{copies['rows']} rows of metrics from {copies['moments']} moments")
    if events["rows"] != events["moments"]:
        twice.append(f"{events['rows']} events from {events['moments']} moments")
    acknowledged = dict.fromkeys(("metrics", "events"), 0)
    for row in ranges:
        acknowledged[row["stream"]] += row["numbers"] - row["dropped"]
    for stream, rows in (("metrics", copies["rows"]), ("events", events["rows"])):
        if rows < acknowledged[stream]:
            missing.append(f"{stream}: {acknowledged[stream]} were acknowledged, {rows} are stored")
        if rows > acknowledged[stream]:
            twice.append(f"{stream}: {acknowledged[stream]} were acknowledged, {rows} are stored")
    return Stored(missing, copies["rows"] + events["rows"], dropped, twice)


def stored(url: str, node_id: str, name: str, numbered: Mapping[Key, int]) -> Stored:
    """Compare what was numbered with what is stored, now."""
    return asyncio.run(_stored(url, node_id, name, numbered))
