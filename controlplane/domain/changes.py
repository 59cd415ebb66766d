"""What an apply would change: which objects, and which deployments get a new revision.

A revision pins a deployment's spec, its agent and its model by digest. It is derived from everything declared, not from
what an apply happened to touch: whatever makes the pinned content differ makes a revision, and nothing else does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from pydantic import ValidationError

from controlplane.domain.declared import Declared, DeclaredAgent, DeclaredModel, Notes
from controlplane.domain.manifests import Agent, Deployment, DeploymentSpec, Group, Manifest, Model, parse_ref


class Action(StrEnum):
    """What happened to an object."""

    CREATED = "created"
    CHANGED = "changed"
    UNCHANGED = "unchanged"


@dataclass(frozen=True, slots=True)
class Change:
    """``replaces_failed``: the version exists, failed to be fetched, and is to be fetched anew."""

    document: Manifest
    action: Action
    replaces_failed: bool = False


@dataclass(frozen=True, slots=True)
class Conflict:
    """Why the document at ``index`` can't be applied over what exists."""

    index: int
    message: str


@dataclass(frozen=True, slots=True)
class NewRevision:
    """``pinned``: ``{spec, agent: {name, digest} | null, model: {name, version, digest}}``."""

    deployment: str
    number: int
    pinned: Mapping[str, Any]
    summary: str


@dataclass(frozen=True, slots=True)
class ApplyPlan:
    """Changes in the order of the documents. With conflicts, nothing of it may be done."""

    changes: tuple[Change, ...]
    revisions: tuple[NewRevision, ...]
    conflicts: tuple[Conflict, ...] = ()


def plan_apply(existing: Declared, documents: Sequence[Manifest]) -> ApplyPlan:
    """The plan for documents whose references were checked and hold."""
    changes, conflicts, after = [], [], existing
    for index, document in enumerate(documents):
        if (sentence := _immutable(document, existing)) is not None:
            conflicts.append(Conflict(index, sentence))
            continue
        changes.append(_change(document, existing))
        after = after.after(document)
    return ApplyPlan(tuple(changes), () if conflicts else plan_revisions(after), tuple(conflicts))


def plan_revisions(declared: Declared) -> tuple[NewRevision, ...]:
    """A new revision for each deployment whose pinned content is not what its newest revision holds."""
    made = []
    for name, deployment in sorted(declared.deployments.items()):
        pinned = pin(deployment.spec, declared.agents, declared.models)
        if _comparable(pinned) != _comparable(deployment.pinned):
            number = deployment.revision + 1
            made.append(NewRevision(name, number, pinned, f"revision {number}: {_summary(pinned)}"))
    return tuple(made)


def pin(
    spec: DeploymentSpec, agents: Mapping[str, DeclaredAgent], models: Mapping[str, DeclaredModel]
) -> dict[str, Any]:
    """The content of a revision of ``spec`` now. Raises KeyError when a reference does not hold."""
    agent = None
    ref = spec.model
    if spec.agent is not None:
        agent = {"name": spec.agent, "digest": agents[spec.agent].digest}
        ref = agents[spec.agent].spec.model.ref
    assert ref is not None
    name, version = parse_ref(ref)
    version = version or models[name].current_version
    model = {"name": name, "version": version, "digest": models[name].versions[version].digest}
    return {"spec": spec.stored(), "agent": agent, "model": model}


def _immutable(document: Manifest, existing: Declared) -> str | None:
    if not isinstance(document, Model):
        return None
    name, version = document.metadata.name, document.spec.version
    model = existing.models.get(name)
    old = model.versions.get(version) if model else None
    # Nothing can have run a version that failed to arrive: it may be corrected in place.
    if old is None or old.failed or old.digest == document.spec.digest():
        return None
    return (
        f"model {name} already has a version {version} with other content, and versions never change: "
        f"raise spec.version (nodes may run {version} now)"
    )


def _change(document: Manifest, existing: Declared) -> Change:
    name = document.metadata.name
    notes = Notes(document.metadata.labels, document.metadata.annotations)
    match document:
        case Model(spec=spec):
            model = existing.models.get(name)
            if model is not None and (old := model.versions.get(spec.version)) is not None and old.failed:
                return Change(document, Action.CHANGED, replaces_failed=True)
            same = model is not None and model.current_version == spec.version and model.notes == notes
            return Change(document, _action(model is not None, same))
        case Agent(spec=spec):
            agent = existing.agents.get(name)
            same = agent is not None and agent.digest == spec.digest() and agent.notes == notes
            return Change(document, _action(agent is not None, same))
        case Group(spec=spec):
            group = existing.groups.get(name)
            same = group is not None and group.selector == spec.selector and group.notes == notes
            return Change(document, _action(group is not None, same))
        case Deployment(spec=spec):
            deployment = existing.deployments.get(name)
            same = deployment is not None and deployment.spec == spec and deployment.notes == notes
            return Change(document, _action(deployment is not None, same))


def _action(exists: bool, same: bool) -> Action:
    if not exists:
        return Action.CREATED
    return Action.UNCHANGED if same else Action.CHANGED


def _comparable(pinned: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """Pinned content with its spec in canonical form: a field that a later release adds makes no revision."""
    if pinned is None:
        return None
    try:
        spec = DeploymentSpec.model_validate(pinned["spec"]).canonical()
    except ValidationError:
        spec = pinned["spec"]
    return {**pinned, "spec": spec}


def _summary(pinned: Mapping[str, Any]) -> str:
    model = f"model {pinned['model']['name']}@{pinned['model']['version']}"
    agent = pinned["agent"]
    return f"agent {agent['name']} ({agent['digest'][:12]}) on {model}" if agent else model
