"""Commands that change something: apply, delete, label, drain, undrain."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from fleetctl import kinds, manifests, screen, session, uploads
from fleetctl.client import Client
from fleetctl.errors import Problem
from fleetctl.kinds import Kind
from fleetctl.manifests import Document
from fleetctl.output import Form, FormOption, is_data, result
from fleetctl.session import Session
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
    output: FormOption = Form.TABLE,
) -> None:
    """Make the fleet what manifests say: all of their documents, or none.

    -o json: {"dryRun", "results": [{"kind", "name", "action": "created"|"changed"|"unchanged", "warnings": []}]}.
    """
    if not file:
        raise UsageError("nothing to apply: give -f FILE, -f FOLDER or -f -")
    documents = manifests.read(file, recursive)
    with session.of(context).client() as client:
        results = apply_documents(client, documents, dry_run, allow_unmatched)
    if is_data(output):
        screen.data(output.value, {"dryRun": dry_run, "results": results})
    else:
        _show_applied(results, dry_run)


def _show_applied(results: list[dict[str, Any]], dry_run: bool) -> None:
    console, notes = screen.out(), screen.err()
    for applied in results:
        action = str(applied.get("action", ""))
        name = f"{str(applied.get('kind', '')).lower()}/{applied.get('name', '')}"
        console.print(f"{name} ", end="")
        console.print(action, style=screen.style_of(action), end="")
        console.print(" (dry run)" if dry_run else "")
        for warning in applied.get("warnings") or ():
            notes.print(f"warning: {name}: {warning}", style="yellow")


def apply_documents(
    client: Client, documents: list[Document], dry_run: bool = False, allow_unmatched: bool = False
) -> list[dict[str, Any]]:
    """Apply manifests; a fault that the server finds is told with its place in the files (Problem)."""
    uploads.check_digests(documents)
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
    output: FormOption = Form.TABLE,
) -> None:
    """Delete objects by name, or all that manifests name. Deleting a node revokes its certificate.

    -o json: {"results": [{"kind", "name", "action": "deleted"|"revoked"|"absent"}]}, up to the first that failed.
    """
    delete_all(session.of(context), _targets(kind_name, names, file, recursive), ignore_not_found, output)


def delete_all(caller: Session, targets: list[tuple[Kind, str]], ignore_not_found: bool, output: Form) -> None:
    """Delete one after the other and tell of each; raises Problem at the first that the server refuses."""
    results: list[dict[str, str]] = []
    try:
        with caller.client() as client:
            for kind, name in targets:
                action = _delete(client, kind, name, ignore_not_found)
                results.append(result(kind, name, action))
                if not is_data(output) and action != "absent":
                    screen.out().print(f"{kind.singular}/{name} {action}")
    finally:
        # What is gone is told, whatever became of the rest.
        if is_data(output):
            screen.data(output.value, {"results": results})


def _delete(client: Client, kind: Kind, name: str, ignore_not_found: bool) -> str:
    try:
        client.call("DELETE", f"/{kind.path}/{name}")
    except Problem as error:
        if error.status != 404 or not ignore_not_found:
            raise
        return "absent"
    return "revoked" if kind is kinds.TOKEN else "deleted"


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
    output: FormOption = Form.TABLE,
) -> None:
    """Set and remove labels of a node. -o json: the node, as `get node` shows it."""
    _patch(session.of(context), node, {"labels": parse_changes(changes)}, "labelled", output)


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


def drain(context: typer.Context, node: NodeArgument, output: FormOption = Form.TABLE) -> None:
    """Let a node finish what it runs and give it no new work. -o json: the node, as `get node` shows it."""
    _patch(session.of(context), node, {"drained": True}, "drains: it gets no new work", output)


def undrain(context: typer.Context, node: NodeArgument, output: FormOption = Form.TABLE) -> None:
    """Give a node work again. -o json: the node, as `get node` shows it."""
    _patch(session.of(context), node, {"drained": False}, "takes work again", output)


def _patch(caller: Session, node: str, change: dict[str, Any], done: str, output: Form) -> None:
    with caller.client() as client:
        changed = client.call("PATCH", f"/nodes/{node}", body=change)
    if is_data(output):
        screen.data(output.value, changed)
    else:
        screen.out().print(f"node/{node} {done}")
