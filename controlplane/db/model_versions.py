"""Model versions on their way in: what is to be fetched, how far it is, and how it ended.

Every write names the digest that it is about: a version that failed may be applied again with other content, and a
fetch of the old content must not speak for the new.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from controlplane.db.engine import hint


@dataclass(frozen=True, slots=True)
class Version:
    """A model version that is not ready. ``spec`` as applied, camelCase."""

    model: str
    version: str
    digest: str
    spec: Mapping[str, Any]

    def __str__(self) -> str:
        return f"{self.model}@{self.version}"


_THIS = "model = :model AND version = :version AND digest = :digest AND phase IN ('pending', 'fetching')"


def _key(version: Version) -> dict[str, Any]:
    return {"model": version.model, "version": version.version, "digest": version.digest}


async def unfinished(connection: AsyncConnection) -> list[Version]:
    """All that wait or are being fetched, oldest first; a fetch that a crash cut short is among them."""
    rows = await connection.execute(
        sa.text("""
            SELECT model, version, digest, spec FROM model_versions WHERE phase IN ('pending', 'fetching')
            ORDER BY created_at, model, version""")
    )
    return [Version(row.model, row.version, row.digest, row.spec) for row in rows]


async def begin(connection: AsyncConnection, version: Version) -> None:
    """Say that its files are being fetched."""
    await connection.execute(
        sa.text(f"""
            UPDATE model_versions SET phase = 'fetching', message = '', bytes_done = 0, bytes_total = 0,
                updated_at = clock_timestamp() WHERE {_THIS}"""),
        _key(version),
    )


async def progress(connection: AsyncConnection, version: Version, done: int, total: int) -> None:
    """Bytes that are here, of ``total`` (0 = not known)."""
    await connection.execute(
        sa.text(f"""
            UPDATE model_versions SET bytes_done = :done, bytes_total = :total, updated_at = clock_timestamp()
            WHERE {_THIS}"""),
        _key(version) | {"done": done, "total": total},
    )


async def postpone(connection: AsyncConnection, version: Version, message: str) -> None:
    """It could not be fetched now; it will be tried again."""
    await connection.execute(
        sa.text(f"""
            UPDATE model_versions SET phase = 'pending', message = :message, updated_at = clock_timestamp()
            WHERE {_THIS}"""),
        _key(version) | {"message": message},
    )


async def fail(connection: AsyncConnection, version: Version, message: str) -> None:
    """It can't be had as it is written; only an operator can change that."""
    failed = await connection.execute(
        sa.text(f"""
            UPDATE model_versions SET phase = 'failed', message = :message, updated_at = clock_timestamp()
            WHERE {_THIS}"""),
        _key(version) | {"message": message},
    )
    if failed.rowcount:
        await _event(connection, "error", version, "ModelFailed", f"version {version.version}: {message}")
        await hint(connection, "spec")


async def finish(connection: AsyncConnection, version: Version, variants: Sequence[Mapping[str, Any]]) -> None:
    """All files are in the artifact store. ``variants``: see ``model_versions.variants``; sizes in ``sizeBytes``."""
    files = {file["sha256"]: file["sizeBytes"] for variant in variants for file in variant["files"]}
    ready = await connection.execute(
        sa.text(f"""
            UPDATE model_versions SET phase = 'ready', message = '', variants = CAST(:variants AS jsonb),
                bytes_done = :size, bytes_total = :size, updated_at = clock_timestamp() WHERE {_THIS}"""),
        _key(version) | {"variants": json.dumps(list(variants)), "size": sum(files.values())},
    )
    if ready.rowcount:
        await _event(connection, "info", version, "ModelReady", f"version {version.version} can be handed out")
        await hint(connection, "spec")


async def add_blob(connection: AsyncConnection, sha256: str, size_bytes: int) -> None:
    """A verified file lies in the artifact store."""
    await connection.execute(
        sa.text("INSERT INTO blobs (sha256, size_bytes) VALUES (:sha256, :size) ON CONFLICT (sha256) DO NOTHING"),
        {"sha256": sha256, "size": size_bytes},
    )


async def _event(connection: AsyncConnection, severity: str, version: Version, reason: str, message: str) -> None:
    await connection.execute(
        sa.text(
            "INSERT INTO events (severity, object, reason, message) VALUES (:severity, :object, :reason, :message)"
        ),
        {"severity": severity, "object": f"model/{version.model}", "reason": reason, "message": message},
    )
