"""References, changes and revisions of an apply, as pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from controlplane.domain.changes import Action, ApplyPlan, pin, plan_apply, plan_revisions
from controlplane.domain.declared import Declared, ModelVersion, users_of
from controlplane.domain.manifests import Manifest
from controlplane.domain.parsing import parse_manifest
from controlplane.domain.references import check_references, refuse_unmatched

SHA = "ab" * 32
LABELS = [{"tier": "demo", "site": "lyon"}, {"tier": "demo", "site": "turin"}, {"hw": "pi5"}]


def manifest(kind: str, name: str, spec: dict[str, Any], **metadata: Any) -> Manifest:
    made = parse_manifest(
        {"apiVersion": "slmfleet/v1", "kind": kind, "metadata": {"name": name, **metadata}, "spec": spec}
    )
    assert not isinstance(made, tuple), made
    return made


def model(version: str = "1", name: str = "smol", source: str = "file:x", **metadata: Any) -> Manifest:
    variants = [{"name": "v", "format": "gguf", "files": [{"source": source, "sha256": SHA}]}]
    return manifest("Model", name, {"version": version, "variants": variants}, **metadata)


def agent(name: str = "greeter", ref: str = "smol", instructions: str = "Hi.", **metadata: Any) -> Manifest:
    return manifest("Agent", name, {"instructions": instructions, "model": {"ref": ref}}, **metadata)


def deployment(name: str = "greeter", **spec: Any) -> Manifest:
    return manifest("Deployment", name, spec or {"agent": "greeter", "selector": "tier=demo", "replicas": 2})


def group(selector: str, name: str = "shops") -> Manifest:
    return manifest("Group", name, {"selector": selector})


def applied(*documents: Manifest, on: Declared | None = None) -> Declared:
    """What is declared after an apply, its revisions stored."""
    start = on or Declared()
    plan = plan_apply(start, documents)
    assert not plan.conflicts
    for document in documents:
        start = start.after(document)
    deployments = dict(start.deployments)
    for made in plan.revisions:
        deployments[made.deployment] = replace(
            deployments[made.deployment], revision=made.number, pinned=dict(made.pinned)
        )
    return replace(start, deployments=deployments)


def told(documents: Sequence[Manifest], existing: Declared | None = None, warnings: bool = False) -> list[str]:
    found = check_references(documents, existing or Declared(), LABELS)
    return [
        f"{item.index}{item.problem.pointer}: {item.problem.message}" for item in found if item.is_warning is warnings
    ]


def actions(plan: ApplyPlan) -> list[Action]:
    return [change.action for change in plan.changes]


BASE = (model(), agent(), deployment())


def test_references_hold_within_one_apply_in_any_order() -> None:
    assert told(BASE) == []
    assert told(BASE[::-1]) == []


def test_references_hold_to_what_exists() -> None:
    existing = applied(model(), agent())
    assert told([deployment()], existing) == []
    assert told([deployment(model="smol@1")], existing) == []


@pytest.mark.parametrize(
    ("document", "sentence"),
    [
        (agent(ref="smoll"), "0/spec/model/ref: there is no model smoll: did you mean smol?"),
        (agent(ref="other"), "0/spec/model/ref: there is no model other: apply the model first, or in the same apply"),
        (agent(ref="smol@2"), "0/spec/model/ref: model smol has no version 2 (it has 1)"),
        (deployment(agent="greter"), "0/spec/agent: there is no agent greter: did you mean greeter?"),
        (deployment(model="smol@9"), "0/spec/model: model smol has no version 9 (it has 1)"),
        (
            deployment(agent="greeter", group="shops"),
            "0/spec/group: there is no group shops: apply the group first, or in the same apply",
        ),
    ],
)
def test_a_reference_to_nothing_is_a_problem(document: Manifest, sentence: str) -> None:
    assert told([document], applied(model(), agent())) == [sentence]


def test_the_same_object_twice_is_a_problem() -> None:
    assert told([model(), model("2")]) == [
        "1/metadata/name: Model smol stands twice, first as document 0: apply one after the other"
    ]


@pytest.mark.parametrize(
    ("documents", "sentences"),
    [
        (
            [deployment(agent="greeter", selector="tier=demoo")],
            ['0/spec/selector: selector "tier=demoo" matches no node now '
             "(labels seen: tier=demo hw=pi5 site=lyon site=turin)"],
        ),
        ([deployment(agent="greeter")], []),
        (
            [group("site=paris"), deployment(agent="greeter", group="shops")],
            ['0/spec/selector: selector "site=paris" matches no node now '
             "(labels seen: site=lyon site=turin hw=pi5 tier=demo)",
             '1/spec/group: selector "site=paris" matches no node now '
             "(labels seen: site=lyon site=turin hw=pi5 tier=demo)"],
        ),
        (
            [group("hw=pi5"), deployment(agent="greeter", group="shops", selector="tier=demo")],
            ["1/spec: selector and group each match nodes, but no node is in both now"],
        ),
    ],
)  # fmt: skip
def test_a_selector_without_nodes_is_a_warning(documents: list[Manifest], sentences: list[str]) -> None:
    existing = applied(model(), agent())
    assert told(documents, existing, warnings=True) == sentences
    assert told(documents, existing) == []


def test_a_fleet_without_nodes_says_so() -> None:
    (finding,) = check_references([group("")], Declared(), [])
    assert finding.problem.message == "the empty selector matches no node now (no node has enrolled yet)"
    assert refuse_unmatched([finding], {0}) == []


def test_only_what_would_be_written_is_refused_for_lack_of_nodes() -> None:
    documents = [group("site=paris"), deployment(agent="greeter", group="shops", selector="site=lyon")]
    findings = check_references(documents, applied(model(), agent()), LABELS)
    assert [item.index for item in refuse_unmatched(findings, {0, 1})] == [0, 1]
    assert refuse_unmatched(findings, set()) == []
    (refusal,) = refuse_unmatched(findings, {1})
    assert (refusal.index, refusal.is_warning) == (1, False)
    assert "allowUnmatched=true (fleetctl apply --allow-unmatched)" in refusal.problem.message


def test_a_first_apply_creates_everything_and_one_revision() -> None:
    plan = plan_apply(Declared(), BASE)
    assert actions(plan) == [Action.CREATED] * 3
    (revision,) = plan.revisions
    assert (revision.deployment, revision.number) == ("greeter", 1)
    assert revision.pinned["agent"] == {"name": "greeter", "digest": BASE[1].spec.digest()}
    assert revision.pinned["model"] == {"name": "smol", "version": "1", "digest": BASE[0].spec.digest()}
    assert revision.pinned["spec"]["replicas"] == 2


def test_applying_again_changes_nothing() -> None:
    plan = plan_apply(applied(*BASE), BASE)
    assert actions(plan) == [Action.UNCHANGED] * 3
    assert plan.revisions == ()


def test_the_order_of_documents_does_not_matter_for_revisions() -> None:
    assert plan_apply(Declared(), BASE).revisions == plan_apply(Declared(), BASE[::-1]).revisions


def test_a_new_model_version_moves_those_that_follow_it_and_no_others() -> None:
    existing = applied(
        *BASE,
        agent("pinned", "smol@1"),
        deployment("pinned", agent="pinned"),
        deployment("bare", model="smol"),
        deployment("bare-pinned", model="smol@1"),
    )
    plan = plan_apply(existing, [model("2")])
    assert actions(plan) == [Action.CHANGED]
    assert [(made.deployment, made.number) for made in plan.revisions] == [("bare", 2), ("greeter", 2)]
    back = plan_apply(applied(model("2"), on=existing), [model("1")])
    assert actions(back) == [Action.CHANGED]
    assert [(made.deployment, made.number) for made in back.revisions] == [("bare", 3), ("greeter", 3)]


def test_an_agent_that_changes_moves_its_deployments() -> None:
    plan = plan_apply(applied(*BASE), [agent(instructions="Hello.")])
    assert actions(plan) == [Action.CHANGED]
    (revision,) = plan.revisions
    assert revision.number == 2
    assert revision.summary.startswith("revision 2: agent greeter (")
    assert revision.summary.endswith(") on model smol@1")


def test_labels_alone_change_the_object_and_make_no_revision() -> None:
    plan = plan_apply(applied(*BASE), [agent(labels={"a": "b"}), model(annotations={"a": "b"})])
    assert actions(plan) == [Action.CHANGED] * 2
    assert plan.revisions == ()


def test_versions_of_a_model_never_change() -> None:
    plan = plan_apply(applied(*BASE), [model(source="file:y")])
    (conflict,) = plan.conflicts
    assert conflict.index == 0
    assert "model smol already has a version 1 with other content" in conflict.message
    assert "raise spec.version" in conflict.message
    assert plan.revisions == ()


@pytest.mark.parametrize("source", ["file:x", "file:y"])
def test_a_version_that_failed_to_arrive_may_be_tried_again_or_corrected(source: str) -> None:
    existing = applied(*BASE)
    smol = existing.models["smol"]
    failed = replace(smol, versions={"1": ModelVersion(smol.versions["1"].digest, failed=True)})
    plan = plan_apply(replace(existing, models={"smol": failed}), [model(source=source)])
    assert plan.conflicts == ()
    assert plan.changes[0].replaces_failed
    assert len(plan.revisions) == (source != "file:x")


def test_a_field_that_a_later_release_adds_makes_no_revision() -> None:
    existing = applied(*BASE)
    old = existing.deployments["greeter"]
    assert old.pinned is not None
    spec = {key: value for key, value in old.pinned["spec"].items() if key not in ("exclusive", "warm")}
    deployments = {"greeter": replace(old, pinned={**old.pinned, "spec": spec})}
    assert plan_revisions(replace(existing, deployments=deployments)) == ()


def test_pin_needs_its_references() -> None:
    spec = applied(*BASE).deployments["greeter"].spec
    with pytest.raises(KeyError):
        pin(spec, {}, {})


def test_users() -> None:
    existing = applied(*BASE, group("hw=pi5"), deployment("bare", model="smol@1", group="shops"))
    assert users_of("Model", "smol", existing) == ["agent greeter", "deployment bare"]
    assert users_of("Agent", "greeter", existing) == ["deployment greeter"]
    assert users_of("Group", "shops", existing) == ["deployment bare"]
    assert users_of("Deployment", "greeter", existing) == []
    assert users_of("Model", "other", existing) == []
