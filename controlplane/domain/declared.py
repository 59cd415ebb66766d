"""What operators have declared so far, as plain values: the ground on which an apply is checked and planned."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from controlplane.domain.manifests import Agent, AgentSpec, Deployment, DeploymentSpec, Group, Manifest, Model


@dataclass(frozen=True, slots=True)
class Notes:
    """Labels and annotations of an object."""

    labels: Mapping[str, str] = field(default_factory=dict)
    annotations: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ModelVersion:
    """``failed``: its files could not be fetched or verified, so nothing can run it."""

    digest: str
    failed: bool = False


@dataclass(frozen=True, slots=True)
class DeclaredModel:
    """A model with its versions by name."""

    notes: Notes
    current_version: str
    versions: Mapping[str, ModelVersion]


@dataclass(frozen=True, slots=True)
class DeclaredAgent:
    """An agent in its current version."""

    notes: Notes
    digest: str
    spec: AgentSpec


@dataclass(frozen=True, slots=True)
class DeclaredGroup:
    """A group."""

    notes: Notes
    selector: str


@dataclass(frozen=True, slots=True)
class DeclaredDeployment:
    """A deployment; ``pinned`` is what its newest ``revision`` holds (None: it has none yet)."""

    notes: Notes
    spec: DeploymentSpec
    revision: int = 0
    pinned: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Declared:
    """Everything declared, by name."""

    models: Mapping[str, DeclaredModel] = field(default_factory=dict)
    agents: Mapping[str, DeclaredAgent] = field(default_factory=dict)
    groups: Mapping[str, DeclaredGroup] = field(default_factory=dict)
    deployments: Mapping[str, DeclaredDeployment] = field(default_factory=dict)

    def after(self, document: Manifest) -> Declared:
        """What would be declared once ``document`` was applied."""
        name = document.metadata.name
        notes = Notes(document.metadata.labels, document.metadata.annotations)
        match document:
            case Model(spec=spec):
                before = self.models.get(name)
                versions = {**(before.versions if before else {}), spec.version: ModelVersion(spec.digest())}
                made = DeclaredModel(notes, spec.version, versions)
                return dataclasses.replace(self, models={**self.models, name: made})
            case Agent(spec=spec):
                agents = {**self.agents, name: DeclaredAgent(notes, spec.digest(), spec)}
                return dataclasses.replace(self, agents=agents)
            case Group(spec=spec):
                return dataclasses.replace(self, groups={**self.groups, name: DeclaredGroup(notes, spec.selector)})
            case Deployment(spec=spec):
                old = self.deployments.get(name)
                deployment = DeclaredDeployment(notes, spec, old.revision if old else 0, old.pinned if old else None)
                return dataclasses.replace(self, deployments={**self.deployments, name: deployment})


def users_of(kind: str, name: str, declared: Declared) -> list[str]:
    """Who needs the object ``name`` of ``kind``, as ``agent greeter``, ``deployment kiosks``, in order."""
    match kind:
        case "Model":
            agents = [user for user, agent in declared.agents.items() if _model_name(agent.spec.model.ref) == name]
            bare = [
                user for user, deployment in declared.deployments.items() if _model_name(deployment.spec.model) == name
            ]
            return [f"agent {user}" for user in sorted(agents)] + [f"deployment {user}" for user in sorted(bare)]
        case "Agent":
            users = [user for user, deployment in declared.deployments.items() if deployment.spec.agent == name]
        case "Group":
            users = [user for user, deployment in declared.deployments.items() if deployment.spec.group == name]
        case _:
            users = []
    return [f"deployment {user}" for user in sorted(users)]


def _model_name(ref: str | None) -> str | None:
    return ref.partition("@")[0] if ref else None
