"""From the words of the wire to rows, and back (pure).

What comes from a node is not trusted to fit a column: Postgres takes no NUL in a text and no number above 2**63 - 1,
and one such value would fail the batch in which the statuses of other nodes travel.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from controlplane.db.sessions import AppliedRow, DesiredRow, OperationRow, ResultRow, StatusRow
from slmfleet.v1 import session_pb2, state_pb2

_MAX_BIGINT = 2**63 - 1
# Of one text that a node sends: reasons and messages are sentences.
_MAX_TEXT = 4000
_MAX_DIGESTS = 10_000
_SHA256 = re.compile(r"[0-9a-f]{64}")


def text(value: str) -> str:
    """``value`` as a column can hold it."""
    return value.replace("\0", "")[:_MAX_TEXT]


def digests(values: Iterable[str]) -> list[str]:
    """Those of ``values`` that are SHA-256 in lower-case hex, each once, not more than a node can sensibly have."""
    return sorted({value for value in values if _SHA256.fullmatch(value)})[:_MAX_DIGESTS]


def number(value: int) -> int:
    """``value`` as a bigint can hold it."""
    return min(value, _MAX_BIGINT)


def inventory(message: state_pb2.Inventory) -> dict[str, Any]:
    """The inventory as JSON: camelCase names, numbers as numbers."""
    found: dict[str, Any] = {}
    for field in message.DESCRIPTOR.fields:
        value = getattr(message, field.name)
        if isinstance(value, str):
            found[field.json_name] = text(value)
        elif isinstance(value, int):
            found[field.json_name] = number(value)
        else:
            found[field.json_name] = [text(item) for item in value]
    return found


def status_row(node_id: str, epoch: int, status: state_pb2.AssignmentStatus) -> StatusRow:
    """An assignment's status as it is stored."""
    true = {item.type for item in status.conditions if item.status == state_pb2.CONDITION_STATUS_TRUE}
    return StatusRow(
        node_id=node_id,
        epoch=epoch,
        assignment_id=text(status.id),
        revision=number(status.revision),
        observed_generation=number(status.observed_generation),
        staged="Staged" in true,
        ready="Ready" in true,
        warm="Warm" in true,
        degraded="Degraded" in true,
        variant=text(status.variant),
        bytes_done=number(status.bytes_done),
        bytes_total=number(status.bytes_total),
        conditions=tuple(_condition(item) for item in status.conditions[:16]),
    )


def _condition(condition: state_pb2.Condition) -> dict[str, Any]:
    words = {state_pb2.CONDITION_STATUS_TRUE: "True", state_pb2.CONDITION_STATUS_FALSE: "False"}
    return {
        "type": text(condition.type),
        "status": words.get(condition.status, "Unknown"),
        "reason": text(condition.reason),
        "message": text(condition.message),
        "changedAt": _moment(condition.changed_at) if condition.HasField("changed_at") else None,
    }


def _moment(stamp: Any) -> str | None:
    """A protobuf Timestamp in RFC 3339."""
    try:
        return str(stamp.ToJsonString())
    except (ValueError, OverflowError):
        # A node's clock may say anything, also what is no date.
        return None


def applied_row(node_id: str, epoch: int, applied: session_pb2.Applied) -> AppliedRow:
    """What a node says of a desired state."""
    return AppliedRow(node_id, epoch, text(applied.timeline), number(applied.generation), text(applied.refused))


def result_row(node_id: str, result: session_pb2.OperationResult) -> ResultRow:
    """How an operation went; bytes that are no JSON are kept as text."""
    return ResultRow(node_id, text(result.id), result.succeeded, text(result.message), _json(result.result_json))


def _json(raw: bytes) -> Any:
    if not raw:
        return None
    # NUL is legal in JSON text and illegal in jsonb.
    clean = raw.decode(errors="replace").replace("\\u0000", "").replace("\0", "")
    try:
        value = json.loads(clean, parse_constant=str)
        # Infinity (1e999) and half a surrogate pair are no JSON for Postgres.
        json.dumps(value, allow_nan=False, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        return clean
    return value


def operation(row: OperationRow) -> session_pb2.Down:
    """An operation for its node."""
    message = session_pb2.Operation(id=row.id, kind=row.kind, arguments_json=_dump(row.arguments))
    message.expires_at.FromDatetime(row.expires_at)
    return session_pb2.Down(operation=message)


def desired_state(row: DesiredRow) -> session_pb2.Down:
    """A desired state for its node."""
    return session_pb2.Down(
        desired_state=state_pb2.DesiredState(
            timeline=row.timeline,
            generation=row.generation,
            sha256=row.sha256,
            document=row.document,
            required_features=list(row.required_features),
        )
    )


def _dump(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()
