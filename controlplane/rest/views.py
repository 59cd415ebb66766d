"""From rows to the objects that the API shows. Every object is
``{apiVersion, kind, metadata, spec, status}`` (docs/architecture.md, "REST")."""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Mapping
from typing import Any

import sqlalchemy as sa

from controlplane.domain.manifests import API_VERSION

Row = sa.Row[Any]


def moment(value: datetime.datetime | None) -> str | None:
    """RFC 3339 in UTC, to the millisecond."""
    if value is None:
        return None
    return value.astimezone(datetime.UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _object(kind: str, row: Row, spec: Mapping[str, Any], status: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "apiVersion": API_VERSION,
        "kind": kind,
        "metadata": {
            "name": row.name,
            "labels": row.labels,
            "annotations": getattr(row, "annotations", {}),
            "createdAt": moment(row.created_at),
            "updatedAt": moment(row.updated_at),
            "resourceVersion": str(row.resource_version),
        },
        "spec": dict(spec),
        "status": dict(status),
    }


def group(row: Row) -> dict[str, Any]:
    """A group."""
    return _object("Group", row, {"selector": row.selector}, {})


def model(row: Row) -> dict[str, Any]:
    """A model in its current version (``objects.models``)."""
    status = {
        "version": row.current_version,
        "digest": row.version_digest,
        "phase": row.version_phase,
        "message": row.version_message,
        "bytesDone": row.version_bytes_done,
        "bytesTotal": row.version_bytes_total,
        "variants": row.version_variants,
    }
    return _object("Model", row, row.version_spec, status)


def model_version(row: Row) -> dict[str, Any]:
    """A row of ``model_versions``."""
    return {
        "version": row.version,
        "digest": row.digest,
        "phase": row.phase,
        "message": row.message,
        "bytesDone": row.bytes_done,
        "bytesTotal": row.bytes_total,
        "variants": row.variants,
        "spec": row.spec,
        "createdAt": moment(row.created_at),
        "updatedAt": moment(row.updated_at),
    }


def agent(row: Row) -> dict[str, Any]:
    """An agent in its current version (``objects.agents``)."""
    return _object("Agent", row, row.spec, {"digest": row.current_digest, "number": row.number})


def agent_version(row: Row) -> dict[str, Any]:
    """A row of ``agent_versions``."""
    return {"digest": row.digest, "number": row.number, "spec": row.spec, "createdAt": moment(row.created_at)}


def deployment(row: Row) -> dict[str, Any]:
    """A deployment. Its counts are what the controllers last wrote, and speak of ``observedRevision``; while that is
    less than ``revision``, the newest, they are out of date."""
    counts = {"desired": 0, "placed": 0, "ready": 0, "warm": 0, "unplaced": [], "message": "not placed yet"}
    revisions = {"revision": row.current_revision, "observedRevision": row.status.get("revision", 0)}
    return _object("Deployment", row, row.spec, {**counts, **row.status, **revisions})


def revision(row: Row) -> dict[str, Any]:
    """A row of ``revisions``."""
    return {"revision": row.number, **row.pinned, "createdAt": moment(row.created_at)}


def replica(row: Row) -> dict[str, Any]:
    """A row of ``objects.replicas``."""
    return {
        "id": row.id,
        "deployment": row.deployment,
        "node": row.node,
        "revision": row.revision,
        "observedRevision": row.observed_revision or 0,
        "reason": row.reason,
        "staged": bool(row.staged),
        "ready": bool(row.ready),
        "warm": bool(row.warm),
        "degraded": bool(row.degraded),
        "conditions": row.conditions or [],
        "variant": row.variant or "",
        "bytesDone": row.bytes_done or 0,
        "bytesTotal": row.bytes_total or 0,
        "createdAt": moment(row.created_at),
    }


def node(row: Row, replicas: Iterable[Row]) -> dict[str, Any]:
    """A node (``objects.nodes``) with its replicas."""
    status = {
        "id": row.id,
        "state": row.state,
        "stateSince": moment(row.state_since),
        "stateReason": row.state_reason,
        "connected": row.connected,
        "lastSeenAt": moment(row.last_seen_at),
        "agentdVersion": row.agentd_version,
        "localApi": row.local_api,
        "inventory": row.inventory,
        "desiredGeneration": row.desired_generation,
        "appliedGeneration": row.applied_generation,
        "refused": row.refused,
        "assignments": [replica(item) for item in replicas],
    }
    return _object("Node", row, {"drained": row.drained}, status)


def event(row: Row) -> dict[str, Any]:
    """A row of ``events``."""
    return {
        "id": str(row.id),
        "at": moment(row.at),
        "severity": row.severity,
        "object": row.object,
        "reason": row.reason,
        "message": row.message,
    }


def metric(row: Row) -> dict[str, Any]:
    """A row of ``node_metrics``: what is asked of it most."""
    return {
        "at": moment(row.at),
        "receivedAt": moment(row.received_at),
        "bootId": row.boot_id,
        "sequence": row.sequence,
        "cpuFraction": row.cpu_fraction,
        "memoryUsedBytes": row.memory_used_bytes,
        "inFlight": row.in_flight,
        "outputTokens": row.output_tokens,
        "requestsOk": row.requests_ok,
        "requestsFailed": row.requests_failed,
    }


def enrollment_token(row: Row) -> dict[str, Any]:
    """A row of ``enrollment_tokens`` with its ``state``; never its secret."""
    return {
        "id": row.id,
        "labels": row.labels,
        "usesLeft": row.uses_left,
        "state": row.state,
        "createdAt": moment(row.created_at),
        "expiresAt": moment(row.expires_at),
    }


def api_key(row: Row) -> dict[str, Any]:
    """A row of ``api_keys``; never the key."""
    return {
        "id": row.id,
        "name": row.name,
        "role": row.role,
        "createdAt": moment(row.created_at),
        "expiresAt": moment(row.expires_at),
    }


def audit(row: Row) -> dict[str, Any]:
    """A row of ``audit``."""
    return {
        "id": str(row.id),
        "at": moment(row.at),
        "actor": row.actor,
        "action": row.action,
        "object": row.object,
        "detail": row.detail,
    }
