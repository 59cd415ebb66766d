"""Commands that look: get, describe, explain."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

import typer

from fleetctl import columns, describe, kinds, screen, session
from fleetctl.client import Client
from fleetctl.columns import at
from fleetctl.errors import Problem
from fleetctl.kinds import Kind
from fleetctl.output import Form, FormOption, Output, OutputOption, is_data
from slmfleet.errors import UsageError


def get(
    context: typer.Context,
    kind_name: Annotated[
        str, typer.Argument(metavar="KIND", help="nodes, models, agents, deployments, groups, tokens or replicas.")
    ],
    name: Annotated[str | None, typer.Argument(help="One object; for replicas, the deployment.")] = None,
    output: OutputOption = Output.TABLE,
    selector: Annotated[
        str | None, typer.Option("--selector", "-l", help="Only what these labels match: a=b,c in (d,e).")
    ] = None,
) -> None:
    """List objects, or show one.

    -o json: one object as the server has it, or {"items": [{...}, ...]}.
    """
    kind = kinds.find(kind_name)
    with session.of(context).client() as client:
        if name and kind not in (kinds.TOKEN, kinds.REPLICA):
            found: Any = client.get(f"/{kind.path}/{name}")
            rows = [found]
        else:
            rows = list(_list(client, kind, name, selector))
            found = {"items": rows}
            if name and kind is kinds.TOKEN:
                if not rows:
                    raise Problem(404, f"there is no enrolment token {name!r}; see `fleetctl get tokens`")
                found = rows[0]
    if is_data(output):
        screen.data(output.value, found)
    elif rows:
        screen.table(screen.out(), columns.columns(kind, session.now()), rows, wide=output is Output.WIDE)
    else:
        scope = f" match {selector!r}" if selector else " yet"
        screen.err().print(f"No {kind.plural}{scope}.", style="dim")


def _list(client: Client, kind: Kind, name: str | None, selector: str | None) -> Iterator[dict[str, Any]]:
    if kind is kinds.REPLICA:
        names = (
            [name] if name else [at(item, "metadata.name") for item in client.items("/deployments", selector=selector)]
        )
        for deployment in names:
            for replica in client.items(f"/deployments/{deployment}/replicas"):
                yield {"deployment": deployment, **replica}
    elif kind is kinds.TOKEN:
        if selector:
            raise UsageError("tokens have no labels of their own to select by; leave -l away")
        yield from (item for item in client.items(f"/{kind.path}") if name in (None, item.get("id")))
    else:
        yield from client.items(f"/{kind.path}", selector=selector)


def describe_command(
    context: typer.Context,
    kind_name: Annotated[str, typer.Argument(metavar="KIND", help="node, model, agent, deployment or group.")],
    name: Annotated[str, typer.Argument()],
    output: FormOption = Form.TABLE,
) -> None:
    """Show one object with its conditions, replicas and newest events.

    -o json: {"object", "replicas": [], "versions": [], "events": [], "nodes": [], "missing": []}; what a kind has none
    of is empty, "missing" says what could not be fetched.
    """
    among = [kind for kind in kinds.KINDS if kind not in (kinds.TOKEN, kinds.REPLICA)]
    kind = kinds.find(kind_name, among)
    with session.of(context).client() as client:
        described = describe.load(client, kind, name)
    if is_data(output):
        screen.data(output.value, describe.facts(described))
        return
    describe.show(screen.out(), describe.blocks(described, session.now()))


def explain(
    context: typer.Context,
    deployment: Annotated[str, typer.Argument()],
    output: OutputOption = Output.TABLE,
) -> None:
    """Say for each node why the deployment runs there, or why not.

    -o json: {"items": [{"node", "chosen", "reason"}, ...]}, as the server has it.
    """
    with session.of(context).client() as client:
        answer = client.get(f"/deployments/{deployment}/explain")
    if is_data(output):
        screen.data(output.value, answer)
        return
    rows = answer.get("items") or answer.get("nodes") or []
    table = [
        screen.Column("NODE", columns.text("node")),
        screen.Column("CHOSEN", lambda row: "yes" if row.get("chosen") else "no"),
        screen.Column("REASON", columns.text("reason")),
    ]
    console = screen.out()
    if message := str(answer.get("message") or ""):
        console.print(message)
    if rows:
        screen.table(console, table, rows)
    else:
        screen.err().print("No nodes yet.", style="dim")
