"""Whether the objects of an apply find all that they name, there or already in the fleet."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from controlplane.domain.declared import Declared
from controlplane.domain.manifests import Agent, Deployment, Group, Manifest, parse_ref
from controlplane.domain.names import nearest
from controlplane.domain.problems import Problem
from controlplane.domain.selectors import parse_selector

_LABELS_SHOWN = 8
_WAY_OUT = (
    "correct it, or repeat with allowUnmatched=true (fleetctl apply --allow-unmatched) if its nodes are yet to enrol"
)


@dataclass(frozen=True, slots=True)
class Finding:
    """Something about the document at ``index``. A warning is told and does not stop the apply. ``is_unmatched``: a
    warning that nodes are missing where some were named, which is a typing error more often than foresight."""

    index: int
    problem: Problem
    is_warning: bool = False
    is_unmatched: bool = False


def check_references(
    documents: Sequence[Manifest], existing: Declared, node_labels: Sequence[Mapping[str, str]]
) -> list[Finding]:
    """Problems and warnings of ``documents`` taken together, on top of what exists; ``node_labels``: one mapping for
    each node of the fleet."""
    together = existing
    for document in documents:
        together = together.after(document)
    findings = list(_repeated(documents))
    for index, document in enumerate(documents):
        findings += [Finding(index, problem) for problem in _missing(document, together)]
        findings += _empty(index, document, together, node_labels)
    return findings


def refuse_unmatched(findings: Iterable[Finding], written: Collection[int]) -> list[Finding]:
    """The findings for which an apply is refused unless the caller allows them: of the documents ``written``, by their
    index. One that stays as it is does no harm that was not there before."""
    return [
        Finding(item.index, Problem(item.problem.pointer, f"{item.problem.message}: {_WAY_OUT}"))
        for item in findings
        if item.is_unmatched and item.index in written
    ]


def _repeated(documents: Sequence[Manifest]) -> Iterator[Finding]:
    first: dict[tuple[str, str], int] = {}
    for index, document in enumerate(documents):
        key = (document.kind, document.metadata.name)
        if key in first:
            sentence = f"{key[0]} {key[1]} stands twice, first as document {first[key]}: apply one after the other"
            yield Finding(index, Problem("/metadata/name", sentence))
        first.setdefault(key, index)


def _missing(document: Manifest, fleet: Declared) -> Iterator[Problem]:
    match document:
        case Agent(spec=agent):
            yield from _missing_model("/spec/model/ref", agent.model.ref, fleet)
        case Deployment(spec=deployment):
            if deployment.agent is not None and deployment.agent not in fleet.agents:
                yield Problem("/spec/agent", _no_such("agent", deployment.agent, fleet.agents))
            if deployment.model is not None:
                yield from _missing_model("/spec/model", deployment.model, fleet)
            if deployment.group is not None and deployment.group not in fleet.groups:
                yield Problem("/spec/group", _no_such("group", deployment.group, fleet.groups))


def _missing_model(pointer: str, text: str, fleet: Declared) -> Iterator[Problem]:
    ref = parse_ref(text)
    model = fleet.models.get(ref.name)
    if model is None:
        yield Problem(pointer, _no_such("model", ref.name, fleet.models))
    elif ref.version is not None and ref.version not in model.versions:
        known = ", ".join(sorted(model.versions))
        yield Problem(pointer, f"model {ref.name} has no version {ref.version} (it has {known})")


def _no_such(kind: str, name: str, known: Iterable[str]) -> str:
    near = nearest(name, known)
    hint = f"did you mean {near}?" if near else f"apply the {kind} first, or in the same apply"
    return f"there is no {kind} {name}: {hint}"


def _empty(
    index: int, document: Manifest, fleet: Declared, node_labels: Sequence[Mapping[str, str]]
) -> Iterator[Finding]:
    match document:
        case Group(spec=group):
            texts = {"/spec/selector": group.selector}
        case Deployment(spec=deployment):
            texts = {"/spec/selector": deployment.selector}
            if deployment.group is not None and deployment.group in fleet.groups:
                texts["/spec/group"] = fleet.groups[deployment.group].selector
        case _:
            return
    alone = {pointer: _selected(text, node_labels) for pointer, text in texts.items()}
    for pointer, nodes in alone.items():
        if not nodes:
            text = texts[pointer]
            what = f'selector "{text}"' if text else "the empty selector"
            problem = Problem(pointer, f"{what} matches no node now ({_seen(text, node_labels)})")
            # An empty selector is every node there will be: it can't be mistaken.
            yield Finding(index, problem, is_warning=True, is_unmatched=bool(text))
    if all(alone.values()) and not _selected(",".join(filter(None, texts.values())), node_labels):
        problem = Problem("/spec", "selector and group each match nodes, but no node is in both now")
        yield Finding(index, problem, is_warning=True, is_unmatched=True)


def _selected(text: str, node_labels: Sequence[Mapping[str, str]]) -> list[Mapping[str, str]]:
    selector = parse_selector(text)
    return [labels for labels in node_labels if selector.matches(labels)]


def _seen(text: str, node_labels: Sequence[Mapping[str, str]]) -> str:
    """The labels that nodes do have: those under the selector's keys first, for they show a typing error best."""
    if not node_labels:
        return "no node has enrolled yet"
    keys = {requirement.key for requirement in parse_selector(text).requirements}
    pairs = {f"{key}={value}": key for labels in node_labels for key, value in labels.items()}
    ranked = sorted(pairs, key=lambda pair: (pairs[pair] not in keys, pair))
    shown = " ".join(ranked[:_LABELS_SHOWN]) + (" ..." if len(ranked) > _LABELS_SHOWN else "")
    return f"labels seen: {shown}" if ranked else "the nodes have no labels"
