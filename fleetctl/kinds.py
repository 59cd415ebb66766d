"""The kinds of object that an operator can name, and where REST has them."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass

from slmfleet.errors import UsageError


@dataclass(frozen=True, slots=True)
class Kind:
    """``path`` is the collection under /api/v1; ``manifest`` the ``kind`` that its documents state, None for none."""

    singular: str
    plural: str
    path: str
    manifest: str | None
    short: str
    deletable: bool = True


NODE = Kind("node", "nodes", "nodes", None, "no")
MODEL = Kind("model", "models", "models", "Model", "mo")
AGENT = Kind("agent", "agents", "agents", "Agent", "ag")
DEPLOYMENT = Kind("deployment", "deployments", "deployments", "Deployment", "deploy")
GROUP = Kind("group", "groups", "groups", "Group", "gr")
TOKEN = Kind("token", "tokens", "enrollment-tokens", None, "tok")
REPLICA = Kind("replica", "replicas", "deployments", None, "rep", deletable=False)
KINDS = (NODE, MODEL, AGENT, DEPLOYMENT, GROUP, TOKEN, REPLICA)


def find(name: str, among: Sequence[Kind] = KINDS) -> Kind:
    """The kind of a word on the command line: singular, plural, short, in any case."""
    wanted = name.lower()
    for kind in among:
        if wanted in (kind.singular, kind.plural, kind.short, kind.path):
            return kind
    words = [kind.plural for kind in among]
    near = difflib.get_close_matches(wanted, [*words, *(kind.singular for kind in among)], n=1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    raise UsageError(f"unknown kind {name!r}{hint}: use one of {', '.join(words)}")


def of_manifest(manifest_kind: object) -> Kind | None:
    """The kind whose documents say ``kind: <manifest_kind>``."""
    return next((kind for kind in KINDS if kind.manifest and kind.manifest == manifest_kind), None)
