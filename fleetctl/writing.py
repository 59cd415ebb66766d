"""Commands that change something: apply, delete, label, drain, undrain."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from fleetctl import kinds, manifests, screen, session, uploads
from fleetctl.client import Client
from fleetctl.errors import Problem
from fleetctl.kinds import Kind
from fleetctl.manifests import Document
from slmfleet.errors import UsageError

FilesOption = Annotated[
    list[str] | None, typer.Option("--file", "-f", help="A manifest file, a folder of them, or - for standard input.")
]
RecursiveOption = Annotated[bool, typer.Option("--recursive", "-R", help="Go into the folders within folders.")]
NodeArgument = Annotated[str, typer.Argument(help="Name of the node.")]


def apply(
    context: typer.Context,
    file: FilesOption = None,
    recursive: RecursiveOption = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would change; change nothing.")] = False,
    allow_unmatched: Annotated[
        bool, typer.Option("--allow-unmatched", help="Accept selectors that match no node yet, with a warning.")
    ] = False,
) -> None:
    """Make the fleet what manifests say: all of their documents, or none."""
    if not file:
        raise UsageError("nothing to apply: give -f FILE, -f FOLDER or -f -")
    documents = manifests.read(file, recursive)
    with session.of(context).client() as client:
        results = apply_documents(client, documents, dry_run, allow_unmatched)
    console, notes = screen.out(), screen.err()
    for result in results:
        action = str(result.get("action", ""))
        name = f"{str(result.get('kind', '')).lower()}/{result.get('name', '')}"
        console.print(f"{name} ", end="")
        console.print(action, style=screen.style_of(action), end="")
        console.print(" (dry run)" if dry_run else "")
        for warning in result.get("warnings") or ():
            notes.print(f"warning: {name}: {warning}", style="yellow")


def apply_documents(
    client: Client, documents: list[Document], dry_run: bool = False, allow_unmatched: bool = False
) -> list[dict[str, Any]]:
    """Apply manifests; a fault that the server finds is told with its place in the files (Problem)."""
    values = [document.value for document in documents]
    if not dry_run:
        values = uploads.send_local_files(client, documents)
    try:
        return client.apply(values, dry_run, allow_unmatched)
    except Problem as error:
        raise Problem(error.status, explain_problem(error, documents), error.faults) from None


def explain_problem(error: Problem, documents: list[Document]) -> str:
    """One line a fault, each with file, line and column; the server's own sentence where it names no place."""
    lines = []
    for fault in error.faults:
        place = manifests.locate(documents, fault)
        lines.append(f"{place}: {fault.message}" if place else f"{fault.pointer}: {fault.message}".removeprefix(": "))
    return "\n".join(lines) or error.detail


def delete(
    context: typer.Context,
    kind_name: Annotated[
        str | None, typer.Argument(metavar="[KIND]", help="node, model, agent, deployment, group or token.")
    ] = None,
    names: Annotated[list[str] | None, typer.Argument(metavar="[NAME]...")] = None,
    file: FilesOption = None,
    recursive: RecursiveOption = False,
    ignore_not_found: Annotated[
        bool, typer.Option("--ignore-not-found", help="What is gone already is no error.")
    ] = False,
) -> None:
    """Delete objects by name, or all that manifests name. Deleting a node revokes its certificate."""
    targets = _targets(kind_name, names, file, recursive)
    console = screen.out()
    with session.of(context).client() as client:
        for kind, name in targets:
            try:
                client.call("DELETE", f"/{kind.path}/{name}")
            except Problem as error:
                if error.status != 404 or not ignore_not_found:
                    raise
            else:
                console.print(f"{kind.singular}/{name} {'revoked' if kind is kinds.TOKEN else 'deleted'}")


def _targets(
    kind_name: str | None, names: list[str] | None, file: list[str] | None, recursive: bool
) -> list[tuple[Kind, str]]:
    if bool(kind_name) == bool(file):
        raise UsageError("say what to delete: KIND NAME, or -f FILE (not both)")
    if file:
        # What is named last leans on what is named first (a deployment on its agent): take it away first.
        found = [_target(document) for document in manifests.read(file, recursive)]
        return list(reversed(found))
    kind = kinds.find(str(kind_name), [kind for kind in kinds.KINDS if kind.deletable])
    if not names:
        raise UsageError(f"name the {kind.plural} to delete: fleetctl delete {kind.singular} NAME ...")
    return [(kind, name) for name in names]


def _target(document: Document) -> tuple[Kind, str]:
    kind = kinds.of_manifest(document.kind)
    if kind is None:
        known = ", ".join(kind.manifest for kind in kinds.KINDS if kind.manifest)
        raise UsageError(f"{document.place('/kind')}: unknown kind {document.kind!r}; known kinds: {known}")
    if not document.name:
        raise UsageError(f"{document.place('/metadata/name')}: metadata.name is missing")
    return kind, document.name


def label(
    context: typer.Context,
    node: NodeArgument,
    changes: Annotated[list[str], typer.Argument(metavar="KEY=VALUE|KEY-...", help="site=lyon sets, site- removes.")],
) -> None:
    """Set and remove labels of a node."""
    labels = parse_changes(changes)
    with session.of(context).client() as client:
        client.call("PATCH", f"/nodes/{node}", body={"labels": labels})
    screen.out().print(f"node/{node} labelled")


def parse_changes(changes: list[str]) -> dict[str, str | None]:
    """``["a=b", "c-"]`` as ``{"a": "b", "c": None}``; raises UsageError for anything else."""
    labels: dict[str, str | None] = {}
    for change in changes:
        key, equals, value = change.partition("=")
        if not equals:
            if not change.endswith("-") or change == "-":
                raise UsageError(f"{change!r} is no change of a label: write key=value to set, key- to remove")
            key = change.removesuffix("-")
        if not key:
            raise UsageError(f"{change!r} is no change of a label: its key is empty")
        labels[key] = value if equals else None
    return labels


def drain(context: typer.Context, node: NodeArgument) -> None:
    """Let a node finish what it runs and give it no new work."""
    _set_drained(context, node, True)


def undrain(context: typer.Context, node: NodeArgument) -> None:
    """Give a node work again."""
    _set_drained(context, node, False)


def _set_drained(context: typer.Context, node: str, drained: bool) -> None:
    with session.of(context).client() as client:
        client.call("PATCH", f"/nodes/{node}", body={"drained": drained})
    screen.out().print(f"node/{node} {'drains: it gets no new work' if drained else 'takes work again'}")
