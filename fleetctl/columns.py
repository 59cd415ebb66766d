"""The columns of ``fleetctl get`` for each kind. Pure: objects of REST and the present in, text out."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fleetctl import human, kinds
from fleetctl.kinds import Kind
from fleetctl.screen import Column, Row
from slmfleet.units import format_size


def at(row: Row, path: str, default: Any = None) -> Any:
    """``at(node, "status.state")``: the value there, ``default`` where any step is missing or null."""
    value: Any = row
    for step in path.split("."):
        value = value.get(step) if isinstance(value, Mapping) else None
        if value is None:
            return default
    return value


def text(path: str) -> Callable[[Row], str]:
    """A cell with the value at a path."""
    return lambda row: str(at(row, path, ""))


def columns(kind: Kind, now: datetime.datetime) -> Sequence[Column]:
    """The columns of one kind; ages count to ``now``."""
    name = Column("NAME", text("metadata.name"))
    age = Column("AGE", lambda row: human.age(at(row, "metadata.createdAt"), now), right=True)
    if kind is kinds.NODE:
        labels = Column("LABELS", lambda row: human.labels(at(row, "metadata.labels")))
        return [name, *_node(now), age, labels]
    if kind is kinds.MODEL:
        return [name, *_model(), age, Column("MESSAGE", text("status.message"), sparse=True)]
    if kind is kinds.AGENT:
        return [name, *_agent(), age]
    if kind is kinds.DEPLOYMENT:
        return [name, *_deployment(), age, Column("MESSAGE", deployment_message, sparse=True)]
    if kind is kinds.GROUP:
        return [name, Column("SELECTOR", text("spec.selector")), age]
    if kind is kinds.TOKEN:
        return token_columns(now)
    return [Column("DEPLOYMENT", text("deployment")), *replica_columns(now)]


def _node(now: datetime.datetime) -> list[Column]:
    return [
        Column("STATE", text("status.state")),
        Column("REPLICAS", lambda row: ready_of(at(row, "status.assignments", ()))),
        Column("SEEN", lambda row: human.age(at(row, "status.lastSeenAt"), now), right=True),
        Column("AGENTD", text("status.agentdVersion"), whole=True),
        Column("HARDWARE", hardware, wide=True),
        Column("LOCAL-API", text("status.localApi"), wide=True, whole=True),
        Column("REASON", text("status.stateReason"), wide=True),
    ]


def _model() -> list[Column]:
    return [
        Column("VERSION", lambda row: str(at(row, "status.version") or at(row, "spec.version", ""))),
        Column("PHASE", model_phase),
        Column("SIZE", lambda row: size(at(row, "status.bytesTotal")), right=True),
        Column("VARIANTS", variants),
    ]


def _agent() -> list[Column]:
    return [
        Column("VERSION", text("status.number")),
        Column("MODEL", text("spec.model.ref")),
        Column("PRIVACY", text("spec.privacy")),
        Column("CALLED", lambda row: ",".join(map(str, at(row, "spec.expose", ())))),
        Column("DESCRIPTION", text("spec.description"), wide=True),
    ]


def _deployment() -> list[Column]:
    return [
        Column("RUNS", runs),
        Column("MODE", mode, wide=True),
        Column("READY", lambda row: f"{at(row, 'status.ready', 0)}/{at(row, 'status.desired', 0)}"),
        Column("WARM", lambda row: str(at(row, "status.warm", 0)), right=True),
        Column("REV", text("status.revision"), right=True),
        Column("SELECTOR", text("spec.selector"), wide=True),
    ]


def token_columns(now: datetime.datetime) -> list[Column]:
    """Enrolment tokens are flat objects: ``{id, state, usesLeft, expiresAt, createdAt, labels}``."""
    return [
        Column("ID", text("id"), whole=True),
        Column("STATE", text("state")),
        Column("USES-LEFT", text("usesLeft"), right=True),
        Column("EXPIRES", lambda row: human.until(row.get("expiresAt"), now)),
        Column("AGE", lambda row: human.age(row.get("createdAt"), now), right=True),
        Column("LABELS", lambda row: human.labels(row.get("labels"))),
    ]


def replica_columns(now: datetime.datetime) -> list[Column]:
    """Replicas as ``/deployments/{name}/replicas`` has them."""
    return [
        Column("NODE", text("node")),
        Column("STATE", replica_state),
        Column("REV", text("revision"), right=True),
        Column("WHY HERE", text("reason")),
        Column("ID", text("id"), wide=True, whole=True),
    ]


def replica_state(row: Row) -> str:
    """The furthest condition that holds; while files come, how many of them are there."""
    if row.get("degraded"):
        return "degraded"
    for word in ("warm", "ready", "staged"):
        if row.get(word):
            return word
    return f"fetching {done}" if (done := human.percent(row.get("bytesDone"), row.get("bytesTotal"))) else "pending"


def ready_of(assignments: Sequence[Row]) -> str:
    """``2/3``: replicas on a node that can serve, of all of them; empty for none."""
    return f"{sum(bool(item.get('ready')) for item in assignments)}/{len(assignments)}" if assignments else ""


def size(value: Any) -> str:
    """``98.4 MB``; empty for nothing."""
    return format_size(value) if isinstance(value, (int, float)) and value else ""


def hardware(node: Row) -> str:
    """``4 CPU, 8.2 GB, x86_64``, from what the node says of itself."""
    inventory = at(node, "status.inventory", {})
    parts = (
        f"{cpus} CPU" if (cpus := inventory.get("cpuCount")) else "",
        size(_number(inventory.get("memoryBytes"))),
        str(inventory.get("machine", "")),
    )
    return ", ".join(filter(None, parts))


def _number(value: Any) -> float:
    try:
        return float(value)  # protobuf's JSON has 64-bit numbers as text
    except (TypeError, ValueError):
        return 0.0


def model_phase(model: Row) -> str:
    """``ready``, ``fetching 45%``, ..."""
    phase = str(at(model, "status.phase", ""))
    done = human.percent(at(model, "status.bytesDone"), at(model, "status.bytesTotal"))
    return f"{phase} {done}" if phase == "fetching" and done else phase


def variants(model: Row) -> str:
    """``q4-1 (gguf)``."""
    found = at(model, "status.variants") or at(model, "spec.variants", ())
    return ", ".join(f"{variant.get('name')} ({variant.get('format')})" for variant in found)


def runs(deployment: Row) -> str:
    """``agent/greeter`` or ``model/smollm2``."""
    agent, model = at(deployment, "spec.agent"), at(deployment, "spec.model")
    return f"agent/{agent}" if agent else f"model/{model}" if model else ""


def mode(deployment: Row) -> str:
    """``2 replicas`` or ``every node``."""
    if at(deployment, "spec.mode") == "every_node":
        return "every node"
    count = at(deployment, "spec.replicas", 1)
    return f"{count} replica{'' if count == 1 else 's'}"


def deployment_message(deployment: Row) -> str:
    """Why it is not whole, as the control plane says it."""
    message = str(at(deployment, "status.message", ""))
    if message:
        return message
    unplaced = at(deployment, "status.unplaced", ())
    return "; ".join(f"{item.get('count')} not placed: {item.get('reason')}" for item in unplaced)
