"""One apply, one delete: each a transaction that checks, plans and writes all or nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from controlplane.db import audit, events, manifests
from controlplane.db.engine import hint
from controlplane.domain.changes import Action, ApplyPlan, plan_apply
from controlplane.domain.declared import users_of
from controlplane.domain.manifests import Manifest
from controlplane.domain.parsing import parse_manifest
from controlplane.domain.problems import Problem
from controlplane.domain.references import Finding, check_references, refuse_unmatched
from controlplane.rest import preconditions
from controlplane.rest.problems import ApiProblem, invalid, not_found

MAX_DOCUMENTS = 1000


@dataclass(frozen=True, slots=True)
class Result:
    """What became of one document."""

    kind: str
    name: str
    action: Action
    warnings: tuple[str, ...]


def parse_all(documents: Sequence[object], prefix: str = "/documents/{}") -> list[Manifest]:
    """The manifests of a request's documents. Raises ApiProblem 422 with all problems of all of them; ``prefix`` is
    where document number ``{}`` stands in the request's body."""
    parsed = [parse_manifest(document) for document in documents]
    problems = [
        problem.under(prefix.format(index))
        for index, manifest in enumerate(parsed)
        if isinstance(manifest, tuple)
        for problem in manifest
    ]
    if problems:
        raise invalid(problems, "invalid-manifest")
    return [manifest for manifest in parsed if not isinstance(manifest, tuple)]


async def apply(
    engine: AsyncEngine,
    documents: Sequence[Manifest],
    actor: str,
    *,
    dry_run: bool = False,
    allow_unmatched: bool = False,
    if_match: str | None = None,
    prefix: str = "/documents/{}",
) -> list[Result]:
    """Apply all of ``documents`` or none. ``if_match`` is about the first (for the write of a single object).

    Raises ApiProblem: 412 stale, 422 for references that do not hold and, unless ``allow_unmatched``, for selectors
    that match no node, 409 for versions that would change.
    """
    async with engine.connect() as connection, connection.begin() as transaction:
        await manifests.lock(connection)
        if if_match is not None:
            await _check_match(connection, documents[0].kind, documents[0].metadata.name, if_match)
        existing = await manifests.load(connection)
        findings = check_references(documents, existing, await manifests.node_labels(connection))
        _refuse([item for item in findings if not item.is_warning], prefix, "invalid-reference")
        plan = plan_apply(existing, documents)
        if plan.conflicts:
            first = plan.conflicts[0]
            errors = [Problem(prefix.format(item.index), item.message) for item in plan.conflicts]
            raise ApiProblem(409, first.message, "version-immutable", errors)
        if not allow_unmatched:
            written = {i for i, change in enumerate(plan.changes) if change.action is not Action.UNCHANGED}
            _refuse(refuse_unmatched(findings, written), prefix, "unmatched-selector")
        if dry_run:
            await transaction.rollback()
        else:
            await _write(connection, plan, actor)
    return _results(plan, findings)


def _refuse(findings: Sequence[Finding], prefix: str, slug: str) -> None:
    if findings:
        raise invalid([item.problem.under(prefix.format(item.index)) for item in findings], slug)


async def _write(connection: AsyncConnection, plan: ApplyPlan, actor: str) -> None:
    written = [change for change in plan.changes if change.action is not Action.UNCHANGED]
    for change in written:
        await manifests.write(connection, change)
        name = f"{change.document.kind.lower()}/{change.document.metadata.name}"
        detail = {"action": str(change.action), "digest": change.document.spec.digest()}
        await audit.record(connection, actor, "apply", name, detail)
    for revision in plan.revisions:
        await manifests.write_revision(connection, revision)
        name = f"deployment/{revision.deployment}"
        await events.record(connection, "info", name, "RevisionCreated", f"{revision.summary}.")
    if written or plan.revisions:
        await hint(connection, "spec")


def _results(plan: ApplyPlan, findings: Sequence[Finding]) -> list[Result]:
    warnings: dict[int, list[str]] = {}
    for finding in findings:
        warnings.setdefault(finding.index, []).append(finding.problem.message)
    return [
        Result(change.document.kind, change.document.metadata.name, change.action, tuple(warnings.get(index, ())))
        for index, change in enumerate(plan.changes)
    ]


async def delete(engine: AsyncEngine, kind: str, name: str, actor: str, if_match: str | None = None) -> None:
    """Delete a declared object. Raises ApiProblem: 404, 412, or 409 naming those that still use it."""
    async with engine.begin() as connection:
        await manifests.lock(connection)
        if await manifests.resource_version(connection, kind, name) is None:
            raise not_found(kind.lower(), name)
        await _check_match(connection, kind, name, if_match)
        users = users_of(kind, name, await manifests.load(connection))
        if users:
            raise ApiProblem(
                409, f"{kind.lower()} {name} is in use by {', '.join(users)}: delete or change those first", "in-use"
            )
        await manifests.delete(connection, kind, name)
        await audit.record(connection, actor, "delete", f"{kind.lower()}/{name}")
        await hint(connection, "spec")


async def _check_match(connection: AsyncConnection, kind: str, name: str, if_match: str | None) -> None:
    version = await manifests.resource_version(connection, kind, name)
    preconditions.check(if_match, version, f"{kind.lower()} {name}")
