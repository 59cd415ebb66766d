"""What operators declare: loaded as plain values, written as the apply plan says.

Writers take ``lock`` first, so that what they planned on is what they write on; an apply is rare and short.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncConnection

from controlplane.db import tables
from controlplane.domain.changes import Change, NewRevision
from controlplane.domain.declared import (
    Declared,
    DeclaredAgent,
    DeclaredDeployment,
    DeclaredGroup,
    DeclaredModel,
    ModelVersion,
    Notes,
)
from controlplane.domain.manifests import Agent, AgentSpec, Deployment, DeploymentSpec, Group, Model

# Any number that nothing else in this database uses for an advisory lock.
_LOCK = 0x6170706C


async def lock(connection: AsyncConnection) -> None:
    """Keep other writers of declared objects out until this transaction ends."""
    await connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_LOCK)))


async def load(connection: AsyncConnection) -> Declared:
    """Everything declared now."""
    return Declared(
        models=await _models(connection),
        agents=await _agents(connection),
        groups=await _groups(connection),
        deployments=await _deployments(connection),
    )


async def node_labels(connection: AsyncConnection) -> list[Mapping[str, str]]:
    """The labels of each node that is not revoked."""
    query = sa.select(tables.nodes.c.labels).where(tables.nodes.c.revoked_at.is_(None))
    return list((await connection.execute(query)).scalars())


def _notes(row: sa.Row[Any]) -> Notes:
    return Notes(row.labels, row.annotations)


async def _models(connection: AsyncConnection) -> dict[str, DeclaredModel]:
    table = tables.model_versions
    versions: dict[str, dict[str, ModelVersion]] = {}
    query = sa.select(table.c.model, table.c.version, table.c.digest, table.c.phase)
    for row in await connection.execute(query):
        versions.setdefault(row.model, {})[row.version] = ModelVersion(row.digest, row.phase == "failed")
    found = await connection.execute(sa.select(tables.models))
    return {row.name: DeclaredModel(_notes(row), row.current_version, versions.get(row.name, {})) for row in found}


async def _agents(connection: AsyncConnection) -> dict[str, DeclaredAgent]:
    agents, versions = tables.agents, tables.agent_versions
    same = sa.and_(versions.c.agent == agents.c.name, versions.c.digest == agents.c.current_digest)
    query = sa.select(agents, versions.c.spec).join(versions, same)
    return {
        row.name: DeclaredAgent(_notes(row), row.current_digest, AgentSpec.model_validate(row.spec, extra="ignore"))
        for row in await connection.execute(query)
    }


async def _groups(connection: AsyncConnection) -> dict[str, DeclaredGroup]:
    found = await connection.execute(sa.select(tables.groups))
    return {row.name: DeclaredGroup(_notes(row), row.selector) for row in found}


async def _deployments(connection: AsyncConnection) -> dict[str, DeclaredDeployment]:
    deployments, revisions = tables.deployments, tables.revisions
    same = sa.and_(revisions.c.deployment == deployments.c.name, revisions.c.number == deployments.c.current_revision)
    query = sa.select(deployments, revisions.c.pinned).join(revisions, same, isouter=True)
    return {
        row.name: DeclaredDeployment(
            _notes(row), DeploymentSpec.model_validate(row.spec, extra="ignore"), row.current_revision, row.pinned
        )
        for row in await connection.execute(query)
    }


async def write(connection: AsyncConnection, change: Change) -> None:
    """Store a created or changed object; its ``resource_version`` counts up."""
    document = change.document
    metadata = document.metadata
    values: dict[str, Any] = {"labels": dict(metadata.labels), "annotations": dict(metadata.annotations)}
    match document:
        case Model(spec=model):
            await _upsert(connection, tables.models, metadata.name, values | {"current_version": model.version})
            await _write_model_version(connection, metadata.name, document, change.replaces_failed)
        case Agent(spec=agent):
            await _upsert(connection, tables.agents, metadata.name, values | {"current_digest": agent.digest()})
            await _write_agent_version(connection, metadata.name, agent)
        case Group(spec=group):
            await _upsert(connection, tables.groups, metadata.name, values | {"selector": group.selector})
        case Deployment(spec=deployment):
            await _upsert(connection, tables.deployments, metadata.name, values | {"spec": deployment.stored()})


async def _upsert(connection: AsyncConnection, table: sa.Table, name: str, values: dict[str, Any]) -> None:
    changed = values | {"updated_at": sa.func.now(), "resource_version": table.c.resource_version + 1}
    statement = insert(table).values(name=name, **values)
    await connection.execute(statement.on_conflict_do_update(index_elements=[table.c.name], set_=changed))


async def _write_model_version(connection: AsyncConnection, name: str, document: Model, again: bool) -> None:
    """A new version, or (``again``) one that failed to arrive and is to be fetched anew."""
    spec = document.spec
    fresh: dict[str, Any] = {"digest": spec.digest(), "spec": spec.stored(), "phase": "pending"}
    statement = insert(tables.model_versions).values(model=name, version=spec.version, **fresh)
    if not again:
        await connection.execute(statement.on_conflict_do_nothing())
        return
    reset = {"variants": [], "message": "", "bytes_done": 0, "bytes_total": 0, "updated_at": sa.func.now()}
    await connection.execute(statement.on_conflict_do_update(constraint="pk_model_versions", set_=fresh | reset))


async def _write_agent_version(connection: AsyncConnection, name: str, spec: AgentSpec) -> None:
    table = tables.agent_versions
    newest = sa.select(sa.func.coalesce(sa.func.max(table.c.number), 0)).where(table.c.agent == name)
    statement = insert(table).values(
        agent=name, digest=spec.digest(), number=newest.scalar_subquery() + 1, spec=spec.stored()
    )
    await connection.execute(statement.on_conflict_do_nothing(index_elements=[table.c.agent, table.c.digest]))


async def write_revision(connection: AsyncConnection, revision: NewRevision) -> None:
    """Store a revision and make it the deployment's current one."""
    await connection.execute(
        sa.insert(tables.revisions).values(
            deployment=revision.deployment, number=revision.number, pinned=dict(revision.pinned)
        )
    )
    table = tables.deployments
    await connection.execute(
        sa.update(table).where(table.c.name == revision.deployment).values(current_revision=revision.number)
    )


TABLES = {
    "Model": tables.models,
    "Agent": tables.agents,
    "Group": tables.groups,
    "Deployment": tables.deployments,
}


async def resource_version(connection: AsyncConnection, kind: str, name: str) -> int | None:
    """How often the object was written; None when there is none."""
    table = TABLES[kind]
    return (await connection.execute(sa.select(table.c.resource_version).where(table.c.name == name))).scalar()


async def delete(connection: AsyncConnection, kind: str, name: str) -> None:
    """Remove an object with its versions or revisions; a deployment with its assignments."""
    if kind == "Deployment":
        await connection.execute(sa.delete(tables.assignments).where(tables.assignments.c.deployment == name))
    table = TABLES[kind]
    await connection.execute(sa.delete(table).where(table.c.name == name))
