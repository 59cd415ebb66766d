"""``fleetctl describe``: one object with all that an operator asks about it, top to bottom.

``load`` fetches what a kind needs, ``blocks`` lays it out (pure), ``show`` prints it.
"""

from __future__ import annotations

import datetime
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.text import Text

from fleetctl import columns as cells
from fleetctl import human, kinds, screen
from fleetctl.client import Client
from fleetctl.columns import at
from fleetctl.errors import Problem
from fleetctl.kinds import Kind
from fleetctl.screen import Column, Row
from slmfleet.units import format_size

_EVENTS = 10


@dataclass(frozen=True, slots=True)
class Described:
    """An object of REST and what belongs to it, as the server sent it."""

    kind: Kind
    value: Row
    replicas: Sequence[Row] = ()
    versions: Sequence[Row] = ()
    events: Sequence[Row] = ()
    # Nodes that a group's selector matches.
    nodes: Sequence[Row] = ()
    # What could not be fetched, and why; the rest is shown.
    missing: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Block:
    """A part of the page: a title ("" = none) over fields, over a table or over plain text."""

    title: str
    pairs: Sequence[tuple[str, str]] = ()
    columns: Sequence[Column] = ()
    rows: Sequence[Row] = ()
    text: str = ""
    empty: str = field(default="")


def load(client: Client, kind: Kind, name: str) -> Described:
    """Fetch an object and what belongs to it; raises Problem when the object itself is not there."""
    value = client.get(f"/{kind.path}/{name}")
    missing: list[str] = []

    def more(path: str, limit: int | None = None, **params: Any) -> list[dict[str, Any]]:
        try:
            return list(client.items(path, limit=limit, **params))
        except Problem as error:
            missing.append(f"{path}: {error}")
            return []

    here = f"/{kind.path}/{name}"
    return Described(
        kind,
        value,
        replicas=more(f"{here}/replicas") if kind is kinds.DEPLOYMENT else (),
        versions=more(f"{here}/versions", _EVENTS) if kind in (kinds.MODEL, kinds.AGENT) else (),
        events=more(f"{here}/events", _EVENTS) if kind in (kinds.NODE, kinds.DEPLOYMENT) else (),
        nodes=more("/nodes", selector=at(value, "spec.selector", "")) if kind is kinds.GROUP else (),
        missing=tuple(missing),
    )


def facts(described: Described) -> dict[str, Any]:
    """All of it for programs, each part as the server sent it."""
    return {
        "object": described.value,
        "replicas": list(described.replicas),
        "versions": list(described.versions),
        "events": list(described.events),
        "nodes": list(described.nodes),
        "missing": list(described.missing),
    }


def blocks(described: Described, now: datetime.datetime) -> list[Block]:
    """The page, top to bottom."""
    parts = {
        kinds.NODE: _node,
        kinds.MODEL: _model,
        kinds.AGENT: _agent,
        kinds.DEPLOYMENT: _deployment,
        kinds.GROUP: _group,
    }[described.kind](described, now)
    if described.kind in (kinds.NODE, kinds.DEPLOYMENT):
        parts.append(Block("Events", columns=_events(now), rows=described.events, empty="none yet"))
    if described.missing:
        parts.append(Block("Could not be fetched", text="\n".join(described.missing)))
    return parts


def show(console: Console, page: Sequence[Block]) -> None:
    """Print blocks; a terminal's width bounds tables and wraps text."""
    width = console.width if console.is_terminal else 120
    for number, block in enumerate(page):
        indent = 2 if block.title else 0
        if block.title:
            if number:
                console.print()
            console.print(Text(block.title, style="bold"))
        if block.pairs:
            screen.fields(console, block.pairs, indent)
        if block.rows:
            screen.table(console, block.columns, block.rows, indent=indent, wrap=True)
        for line in block.text.splitlines():
            console.print(textwrap.fill(line, width, initial_indent=" " * indent, subsequent_indent=" " * indent))
        if not (block.pairs or block.rows or block.text):
            console.print(Text(" " * indent + block.empty, style="dim"))


def _head(described: Described, now: datetime.datetime, *pairs: tuple[str, str]) -> Block:
    metadata = described.value.get("metadata", {})
    labels = metadata.get("labels") or {}
    return Block(
        "",
        pairs=[
            ("Name", str(metadata.get("name", ""))),
            ("Kind", described.kind.singular),
            ("Labels", "\n".join(f"{key}={value}" for key, value in sorted(labels.items()))),
            ("Created", _moment(metadata.get("createdAt"), now)),
            *pairs,
        ],
    )


def _node(described: Described, now: datetime.datetime) -> list[Block]:
    status = described.value.get("status", {})
    inventory = status.get("inventory", {})
    desired, applied = status.get("desiredGeneration", 0), status.get("appliedGeneration", 0)
    since = human.age(status.get("stateSince"), now)
    reason = f": {status['stateReason']}" if status.get("stateReason") else ""
    settled = "up to date" if desired == applied else f"waiting for the node, which holds {applied}"
    page = [
        _head(
            described,
            now,
            ("State", f"{status.get('state', '-')} for {since}{reason}"),
            ("Connected", "yes" if status.get("connected") else "no"),
            ("Last seen", f"{human.age(status['lastSeenAt'], now)} ago" if status.get("lastSeenAt") else "never"),
            ("agentd", str(status.get("agentdVersion", ""))),
            ("Local API", str(status.get("localApi", ""))),
            ("Desired state", f"generation {desired}, {settled}"),
            *([("Refused", str(status["refused"]))] if status.get("refused") else []),
        ),
        Block("Hardware", pairs=_inventory(inventory), empty="not reported yet"),
    ]
    assignments = at(described.value, "status.assignments", ())
    page.append(Block("Replicas here", columns=_assignments(), rows=assignments, empty="none"))
    page += _conditions(assignments, "deployment")
    return page


def _inventory(inventory: Mapping[str, Any]) -> list[tuple[str, str]]:
    names = {
        "hostname": "Host", "machine": "Machine", "os": "System", "kernel": "Kernel", "cpuModel": "CPU",
        "cpuCount": "CPUs", "memoryBytes": "Memory", "diskBytes": "Disk", "diskFreeBytes": "Disk free",
        "formats": "Formats", "accelerators": "Accelerators", "limits": "Limits by",
    }  # fmt: skip
    pairs = []
    for key, title in names.items():
        value = inventory.get(key)
        if value in (None, "", []):
            continue
        is_size = key.endswith("Bytes") and str(value).isdecimal()
        pairs.append((title, format_size(int(value)) if is_size else _plain(value)))
    return pairs


def _assignments() -> list[Column]:
    return [
        Column("DEPLOYMENT", cells.text("deployment")),
        Column("STATE", cells.replica_state),
        Column("REV", cells.text("revision"), right=True),
        Column("WHY HERE", cells.text("reason"), sparse=True),
    ]


def _model(described: Described, now: datetime.datetime) -> list[Block]:
    value = described.value
    done, total = at(value, "status.bytesDone", 0), at(value, "status.bytesTotal", 0)
    page = [
        _head(
            described,
            now,
            ("Version", str(at(value, "status.version") or at(value, "spec.version", ""))),
            ("Phase", cells.model_phase(value)),
            ("Message", str(at(value, "status.message", ""))),
            ("Fetched", f"{format_size(done)} of {format_size(total)}" if total else ""),
            ("Context", f"{at(value, 'spec.contextTokens')} tokens" if at(value, "spec.contextTokens") else ""),
            ("Description", str(at(value, "spec.description", ""))),
        )
    ]
    for variant in at(value, "status.variants") or at(value, "spec.variants", ()):
        about = ", ".join(filter(None, (variant.get("format"), variant.get("quantization"))))
        files = [Column("FILE", cells.text("name")), Column("SIZE", _file_size, right=True)]
        files += [Column("SHA-256", cells.text("sha256")), Column("SOURCE", cells.text("source"), sparse=True)]
        page.append(Block(f"Variant {variant.get('name')} ({about})", columns=files, rows=variant.get("files", ())))
    page.append(Block("Versions", columns=_versions(now), rows=described.versions, empty="none"))
    return page


def _file_size(file: Row) -> str:
    return cells.size(file.get("sizeBytes") or file.get("size"))


def _agent(described: Described, now: datetime.datetime) -> list[Block]:
    spec = described.value.get("spec", {})
    digest = str(at(described.value, "status.digest", ""))
    page = [
        _head(
            described,
            now,
            ("Version", f"{at(described.value, 'status.number', '-')}, digest {digest[:12]}"),
            ("Model", str(at(spec, "model.ref", ""))),
            ("Privacy", str(spec.get("privacy", ""))),
            ("Called from", _plain(spec.get("expose", ()))),
            ("Description", str(spec.get("description", ""))),
        ),
        Block("Instructions", text=str(spec.get("instructions", "")), empty="none"),
    ]
    for key in ("options", "limits", "resources"):
        pairs = [(name, _plain(value)) for name, value in (spec.get(key) or {}).items() if value not in (None, [])]
        if pairs:
            page.append(Block(key.capitalize(), pairs=pairs))
    page.append(Block("Versions", columns=_versions(now), rows=described.versions, empty="none"))
    return page


def _deployment(described: Described, now: datetime.datetime) -> list[Block]:
    value = described.value
    status = value.get("status", {})
    warm = at(value, "spec.warm")
    page = [
        _head(
            described,
            now,
            ("Runs", cells.runs(value)),
            ("Mode", cells.mode(value)),
            ("Selector", str(at(value, "spec.selector", "") or "every node")),
            ("Group", str(at(value, "spec.group", ""))),
            ("Revision", str(status.get("revision", ""))),
            ("On disconnect", str(at(value, "spec.onDisconnect", ""))),
            ("Exclusive", "yes" if at(value, "spec.exclusive") else "no"),
            ("Ready", f"{status.get('ready', 0)}/{status.get('desired', 0)}"),
            ("Warm", f"{status.get('warm', 0)}/{status.get('desired', 0) if warm is None else warm}"),
            ("Message", cells.deployment_message(value)),
        ),
        Block("Replicas", columns=cells.replica_columns(now), rows=described.replicas, empty="none placed"),
    ]
    page += _conditions(described.replicas, "node")
    return page


def _group(described: Described, now: datetime.datetime) -> list[Block]:
    columns = [column for column in cells.columns(kinds.NODE, now) if not column.wide]
    return [
        _head(described, now, ("Selector", str(at(described.value, "spec.selector", "")))),
        Block("Nodes", columns=columns, rows=described.nodes, empty="no node matches"),
    ]


def _conditions(replicas: Sequence[Row], owner: str) -> list[Block]:
    rows = [
        {"owner": replica.get(owner, ""), **condition}
        for replica in replicas
        for condition in replica.get("conditions") or ()
    ]
    columns = [
        Column(owner.upper(), cells.text("owner")),
        Column("CONDITION", cells.text("type")),
        Column("STATUS", lambda row: str(row.get("status", "")).removeprefix("CONDITION_STATUS_").lower()),
        Column("REASON", cells.text("reason")),
        Column("MESSAGE", cells.text("message")),
    ]
    return [Block("Conditions", columns=columns, rows=rows)] if rows else []


def _versions(now: datetime.datetime) -> list[Column]:
    return [
        Column("VERSION", lambda row: str(row.get("number") or row.get("version", ""))),
        Column("PHASE", cells.text("phase"), sparse=True),
        Column("DIGEST", lambda row: str(row.get("digest", ""))[:12]),
        Column("AGE", lambda row: human.age(row.get("createdAt"), now), right=True),
    ]


def _events(now: datetime.datetime) -> list[Column]:
    return [
        Column("AGE", lambda row: human.age(row.get("at"), now), right=True),
        Column("SEVERITY", cells.text("severity")),
        Column("REASON", cells.text("reason")),
        Column("MESSAGE", cells.text("message")),
    ]


def _moment(value: Any, now: datetime.datetime) -> str:
    moment = human.parse_time(value)
    return f"{moment.astimezone():%Y-%m-%d %H:%M:%S} ({human.age(value, now)} ago)" if moment else "-"


def _plain(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    return str(value)
