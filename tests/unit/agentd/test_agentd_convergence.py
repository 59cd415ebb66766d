"""The plan: tables for single decisions, properties for the whole."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentd.artifacts.quota import Room, prune, refusal
from agentd.convergence.conditions import stamp
from agentd.convergence.facts import (
    Actual,
    Failure,
    Fetch,
    Limits,
    Link,
    Plan,
    RemoveBlob,
    RemovePartial,
    RemoveView,
    Verify,
)
from agentd.convergence.items import NoVariant, choose_variant, manifest_problem
from agentd.convergence.plan import plan, retry_delay_s
from agentd.models.types import ModelKey, ModelState, ModelStatus, RuntimeOptions
from slmfleet.v1 import state_pb2 as pb
from slmfleet.variants import Hardware

A, B, C = "a" * 64, "b" * 64, "c" * 64
SIZES = {A: 100, B: 200, C: 300}
DIGEST = "d" * 64
ROOM = Room(cache_bytes=0, free_bytes=10_000, reserve_bytes=100)
LIMITS = Limits(frozenset({"gguf", "onnx-genai"}), ROOM, Path("/views"), keep_alive_s=300.0, context_tokens=2048)


def variant(name: str = "q4", fmt: str = "gguf", *digests: str) -> pb.Variant:
    files = [
        pb.FileRef(sha256=digest, size_bytes=SIZES.get(digest, 1), name=f"part{number}.gguf")
        for number, digest in enumerate(digests or (A,))
    ]
    return pb.Variant(name=name, format=fmt, files=files)


def assignment(key: str = "a1", *variants: pb.Variant, **fields: object) -> pb.Assignment:
    model = pb.ModelManifest(name="m", version="1", digest=DIGEST, variants=variants or (variant(),))
    given_fields = {"phase": pb.ASSIGNMENT_PHASE_ACTIVE, "deployment": "d", **fields}
    return pb.Assignment(id=key, revision=1, model=model, **given_fields)


def document(*assignments: pb.Assignment) -> pb.NodeDocument:
    return pb.NodeDocument(assignments=assignments)


def conditions(current: Plan, key: str = "a1") -> dict[str, pb.Condition]:
    status = next(status for status in current.statuses if status.id == key)
    return {condition.type: condition for condition in status.conditions}


def is_true(condition: pb.Condition) -> bool:
    return condition.status == pb.CONDITION_STATUS_TRUE


def model_status(state: ModelState, reason: str = "", crashes: int = 0, **more: object) -> ModelStatus:
    return ModelStatus(
        ModelKey("m", "1", "q4"), state, "gguf", 1, 0, 0, 0, reason, None, None, crashes,
        **more,  # type: ignore[arg-type]
    )  # fmt: skip


def test_without_a_document_nothing_is_touched() -> None:
    current = plan(None, 0, Actual(verified={A: 100}, views={(DIGEST, "q4")}), LIMITS, 0.0)
    assert (current.steps, current.models, current.statuses) == ((), (), ())


@pytest.mark.parametrize(
    ("actual", "steps", "staged", "reason"),
    [
        (Actual(), [Fetch], False, "Waiting"),
        (Actual(partial={A: 40}, busy_with=A), [], False, "Downloading"),
        (Actual(unverified={A: 100}), [Verify], False, "Waiting"),
        (Actual(unverified={A: 100}, busy_with=A), [], False, "Verifying"),
        (Actual(verified={A: 100}), [Link], True, "Verified"),
        (Actual(verified={A: 100}, views={(DIGEST, "q4")}, linked={(DIGEST, "q4")}), [], True, "Verified"),
        (Actual(failures={A: Failure("DigestMismatch", "wrong", 50.0, 1)}), [], False, "DigestMismatch"),
        (Actual(failures={A: Failure("FetchFailed", "gone", 5.0, 1)}), [Fetch], False, "FetchFailed"),
    ],
)  # fmt: skip
def test_each_state_of_a_file_has_its_next_step(actual: Actual, steps: list[type], staged: bool, reason: str) -> None:
    current = plan(document(assignment()), 3, actual, LIMITS, now_s=10.0)
    assert [type(step) for step in current.steps] == steps
    found = conditions(current)["Staged"]
    assert (is_true(found), found.reason) == (staged, reason)
    assert current.statuses[0].observed_generation == 3


def test_a_failed_file_waits_for_its_time_and_the_plan_says_when_to_wake() -> None:
    actual = Actual(failures={A: Failure("FetchFailed", "gone", 50.0, 1)})
    assert plan(document(assignment()), 1, actual, LIMITS, 49.0).wake_at_s == 50.0
    assert plan(document(assignment()), 1, actual, LIMITS, 50.0).steps == (Fetch(A, 100, "the desired state needs it"),)


def test_a_linked_model_is_offered_with_the_longest_keep_alive_and_highest_priority() -> None:
    first = assignment("a1", agent=pb.AgentManifest(name="x", keep_alive_s=10, priority=20))
    second = assignment("a2", warm=True, agent=pb.AgentManifest(name="y", keep_alive_s=-1, priority=70))
    actual = Actual(verified={A: 100}, views={(DIGEST, "q4")}, linked={(DIGEST, "q4")})
    (model,) = plan(document(first, second), 1, actual, LIMITS, 0.0).models
    assert model.key == ModelKey("m", "1", "q4")
    assert model.entry == Path("/views") / DIGEST / "q4" / "part0.gguf"
    assert (model.warm, model.keep_alive_s, model.priority, model.context_tokens) == (True, -1.0, 70, 2048)


def test_a_folder_format_is_entered_by_its_folder() -> None:
    onnx = variant("int4", "onnx-genai", A, B)
    actual = Actual(verified={A: 100, B: 200}, views={(DIGEST, "int4")}, linked={(DIGEST, "int4")})
    (model,) = plan(document(assignment("a1", onnx)), 1, actual, LIMITS, 0.0).models
    assert model.entry == Path("/views") / DIGEST / "int4"


def test_prefetch_brings_the_files_and_serves_nothing() -> None:
    wanted = assignment(phase=pb.ASSIGNMENT_PHASE_PREFETCH)
    actual = Actual(verified={A: 100}, views={(DIGEST, "q4")}, linked={(DIGEST, "q4")})
    current = plan(document(wanted), 1, actual, LIMITS, 0.0)
    assert current.models == ()
    assert not is_true(conditions(current)["Ready"])
    assert is_true(conditions(current)["Staged"])


def test_an_exclusive_assignment_does_not_serve_without_a_lease() -> None:
    actual = Actual(verified={A: 100}, views={(DIGEST, "q4")}, linked={(DIGEST, "q4")})
    current = plan(document(assignment(lease_epoch=4)), 1, actual, LIMITS, 0.0)
    assert current.models == ()
    assert conditions(current)["Ready"].reason == "NoLease"


def test_files_of_active_assignments_come_before_prefetched_ones() -> None:
    later = assignment("a1", variant("q4", "gguf", A), phase=pb.ASSIGNMENT_PHASE_PREFETCH)
    now = assignment("a2", variant("q8", "gguf", B))
    (step,) = plan(document(later, now), 1, Actual(), LIMITS, 0.0).steps
    assert isinstance(step, Fetch)
    assert step.sha256 == B


def test_a_file_that_two_variants_share_is_counted_and_fetched_once() -> None:
    both = document(assignment("a1", variant("q4", "gguf", A)), assignment("a2", variant("q4", "gguf", A)))
    assert len(plan(both, 1, Actual(), LIMITS, 0.0).steps) == 1


def test_no_backend_is_told_as_such() -> None:
    current = plan(document(assignment()), 1, Actual(), replace(LIMITS, formats=frozenset()), 0.0)
    assert conditions(current)["Ready"].reason == "NoBackend"
    assert current.steps == ()
    assert current.chosen == {}


@pytest.mark.parametrize(
    ("status", "ready", "degraded", "words"),
    [
        (model_status(ModelState.BACKING_OFF, "it is no model", crashes=1), "LoadFailed", "Retrying", "it is no model"),
        (model_status(ModelState.UNLOADED, "killed", crashes=4), "Loadable", "Retrying", "killed"),
        (
            model_status(ModelState.BACKING_OFF, "killed", crashes=5, degraded=True, log_lines=("one", "two")),
            "LoadFailed", "CrashLoop", "killed; its last words: one; two",
        ),
        (model_status(ModelState.LOADING, "killed", crashes=6, degraded=True), "Loadable", "CrashLoop", "killed"),
        (model_status(ModelState.UNLOADED, "it needs 9 GB"), "Loadable", "ModelTrouble", "it needs 9 GB"),
        (model_status(ModelState.READY, thrashing="it is slow"), "Loadable", "Thrashing", "it is slow"),
        (model_status(ModelState.READY), "Loadable", "Healthy", ""),
    ],
)  # fmt: skip
def test_trouble_of_a_model(status: ModelStatus, ready: str, degraded: str, words: str) -> None:
    actual = Actual(verified={A: 100}, views={(DIGEST, "q4")}, linked={(DIGEST, "q4")}, models={status.key: status})
    found = conditions(plan(document(assignment()), 1, actual, LIMITS, 0.0))
    assert found["Ready"].reason == ready
    assert (found["Degraded"].reason, found["Degraded"].message) == (degraded, words)
    assert is_true(found["Degraded"]) == (degraded not in ("Healthy", "Retrying"))


def test_a_model_is_loaded_as_its_manifest_says_and_warmed_with_its_agents_instructions() -> None:
    agents = [("low", 10, "Be slow."), ("high", 90, "Be kind."), ("twin", 90, "Be kind.")]
    items = [
        assignment(name, warm=name != "low",
                   agent=pb.AgentManifest(name=name, priority=priority, instructions=instructions))
        for name, priority, instructions in agents
    ]  # fmt: skip
    for item in items:
        item.model.runtime.CopyFrom(pb.RuntimeSettings(slots=2, gpu_layers=0, kv_type="q8_0", numa="everywhere"))
    actual = Actual(verified={A: 100}, views={(DIGEST, "q4")}, linked={(DIGEST, "q4")})
    (model,) = plan(document(*items), 1, actual, LIMITS, 0.0).models
    assert model.runtime == RuntimeOptions(slots=2, gpu_layers=0, kv_type="q8_0")
    assert model.warm_prompts == ("Be kind.",)


@pytest.mark.parametrize(
    ("state", "warm", "reason"),
    [
        (ModelState.READY, True, "Loaded"),
        (ModelState.LOADING, False, "Loading"),
        (ModelState.UNLOADED, False, "OnDemand"),
        (ModelState.STOPPING, False, "Unloading"),
    ],
)
def test_warm_is_what_the_host_says(state: ModelState, warm: bool, reason: str) -> None:
    key = ModelKey("m", "1", "q4")
    actual = Actual(
        verified={A: 100}, views={(DIGEST, "q4")}, linked={(DIGEST, "q4")}, models={key: model_status(state)}
    )
    found = conditions(plan(document(assignment()), 1, actual, LIMITS, 0.0))["Warm"]
    assert (is_true(found), found.reason) == (warm, reason)


def test_what_is_desired_no_more_goes_but_files_stay_while_there_is_room() -> None:
    actual = Actual(
        verified={A: 100, B: 200}, partial={C: 5}, views={(DIGEST, "q4"), ("e" * 64, "old")}, linked={(DIGEST, "q4")}
    )
    steps = plan(document(assignment()), 1, actual, LIMITS, 0.0).steps
    assert steps == (
        RemoveView("e" * 64, "old", "nothing desired uses it"),
        RemovePartial(C, "it is not needed any more"),
    )


def test_room_for_a_download_is_made_by_deleting_what_was_unused_longest() -> None:
    limits = replace(LIMITS, room=Room(0, free_bytes=150, reserve_bytes=100))
    actual = Actual(verified={B: 200, C: 300}, used_at={B: 10, C: 5})
    removed = [step for step in plan(document(assignment()), 1, actual, limits, 0.0).steps
               if isinstance(step, RemoveBlob)]  # fmt: skip
    assert [step.sha256 for step in removed] == [C]


def test_a_full_disk_is_a_condition_and_no_download_starts() -> None:
    limits = replace(LIMITS, room=Room(0, free_bytes=150, reserve_bytes=100))
    current = plan(document(assignment()), 1, Actual(), limits, 0.0)
    assert current.steps == ()
    assert conditions(current)["Staged"].reason == "DiskFull"
    assert is_true(conditions(current)["Degraded"])
    assert current.wake_at_s is not None


def test_a_cache_that_is_too_small_is_a_condition() -> None:
    bounds = pb.NodeSettings(model_cache_bytes=50)
    wanted = pb.NodeDocument(settings=bounds, assignments=[assignment()])
    assert conditions(plan(wanted, 1, Actual(), LIMITS, 0.0))["Staged"].reason == "CacheTooSmall"


def test_two_contents_under_one_name_are_a_conflict_of_the_second_only() -> None:
    other = assignment("a2")
    other.model.digest = "e" * 64
    current = plan(document(assignment("a1"), other), 1, Actual(), LIMITS, 0.0)
    assert set(current.chosen) == {"a1"}
    assert conditions(current, "a2")["Ready"].reason == "VersionConflict"


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../b", "", "a//b", "./a"])
def test_file_names_that_leave_the_folder_are_refused(name: str) -> None:
    bad = variant()
    bad.files[0].name = name
    current = plan(document(assignment("a1", bad)), 1, Actual(), LIMITS, 0.0)
    assert conditions(current)["Ready"].reason == "BadManifest"
    assert current.steps == ()


@pytest.mark.parametrize(
    "change",
    [
        lambda item: setattr(item.model, "digest", "../../x"),
        lambda item: setattr(item.model.variants[0], "name", "../q4"),
        lambda item: setattr(item.model.variants[0].files[0], "sha256", "A" * 64),
        lambda item: item.model.variants[0].ClearField("files"),
        lambda item: setattr(item.model, "name", ""),
    ],
)
def test_manifests_that_would_become_paths_are_checked(change) -> None:  # type: ignore[no-untyped-def]
    item = assignment()
    assert manifest_problem(item) == ""
    change(item)
    assert manifest_problem(item) != ""


@pytest.mark.parametrize(
    ("wanted", "formats", "chosen"),
    [
        ("", {"gguf", "onnx-genai"}, "q4"),
        ("", {"onnx-genai"}, "int4"),
        ("int4", {"gguf", "onnx-genai"}, "int4"),
        ("int4", {"gguf"}, "NoBackend"),
        ("nope", {"gguf"}, "NoSuchVariant"),
        ("", set(), "NoBackend"),
    ],
)
def test_variant_choice(wanted: str, formats: set[str], chosen: str) -> None:
    model = assignment("a1", variant("q4"), variant("int4", "onnx-genai", B)).model
    found = choose_variant(model, wanted, formats)
    assert (found.reason if isinstance(found, NoVariant) else found[0].name) == chosen


def test_device_decides_where_nobody_named_a_variant() -> None:
    small, large = variant("q4", "gguf", A), variant("q8", "gguf", B)
    small.quantization, large.quantization = "Q4_0", "Q8_0"
    small.files[0].size_bytes, large.files[0].size_bytes = 10**9, 2 * 10**9
    told = document(assignment("a1", large, small))

    def ran(hardware: Hardware, profile: str = "balanced") -> pb.AssignmentStatus:
        limits = replace(LIMITS, hardware=hardware, profile=profile)
        actual = Actual(verified={A: 10**9, B: 2 * 10**9}, linked={(DIGEST, "q4"), (DIGEST, "q8")})
        return plan(told, 1, actual, limits, 0.0).statuses[0]

    plain = ran(Hardware(6 * 10**9, 4))
    assert plain.variant == "q4"
    ready = next(item for item in plain.conditions if item.type == "Ready")
    assert "variant q4: the best quality up to what a plain device runs well" in ready.message
    assert ran(Hardware(6 * 10**9, 4, frozenset({"nvidia"}))).variant == "q8"
    assert ran(Hardware(6 * 10**9, 4), "performance").variant == "q4"
    tight = ran(Hardware(10**9, 4))
    assert tight.variant == ""
    assert [item.reason for item in tight.conditions if item.type == "Ready"] == ["NoMemory"]


@pytest.mark.parametrize(
    ("privacy", "away", "reason"),
    [
        (pb.PRIVACY_DEVICE, True, "PrivacyForbids"),
        (pb.PRIVACY_UNSPECIFIED, True, "PrivacyForbids"),
        (pb.PRIVACY_FLEET, True, "PrivacyForbids"),
        (pb.PRIVACY_ANY, True, "Loadable"),
        (pb.PRIVACY_DEVICE, False, "Loadable"),
    ],
)
def test_private_words_go_to_no_server_elsewhere(privacy: pb.Privacy, away: bool, reason: str) -> None:
    told = document(assignment("a1", variant("far", "upstream", A), agent=pb.AgentManifest(name="x", privacy=privacy)))
    view = frozenset({(DIGEST, "far")})
    actual = Actual(verified={A: 100}, views=view, linked=view, away=view if away else frozenset())
    made = plan(told, 1, actual, replace(LIMITS, formats=frozenset({"upstream"})), 0.0)
    [ready] = [item for item in made.statuses[0].conditions if item.type == "Ready"]
    assert ready.reason == reason
    assert bool(made.models) == bool(made.ready) == (reason == "Loadable")


def test_changed_at_moves_only_with_status_or_reason() -> None:
    before = stamp({}, plan(document(assignment()), 1, Actual(), LIMITS, 0.0).statuses, 1000)
    same = stamp(before, plan(document(assignment()), 2, Actual(partial={A: 3}), LIMITS, 0.0).statuses, 2000)
    assert [item.changed_at.ToMilliseconds() for item in same["a1"].conditions] == [1000] * 4
    after = stamp(same, plan(document(assignment()), 2, Actual(verified={A: 100}), LIMITS, 0.0).statuses, 3000)
    changed = {item.type: item.changed_at.ToMilliseconds() for item in after["a1"].conditions}
    assert (changed["Staged"], changed["Degraded"]) == (3000, 1000)


# --- properties -------------------------------------------------------------------------------------------------------

DIGESTS = [character * 64 for character in "abcdef"]


@st.composite
def worlds(draw: st.DrawFn) -> tuple[pb.NodeDocument, Actual]:
    assignments = []
    for number in range(draw(st.integers(0, 4))):
        files = draw(st.lists(st.sampled_from(DIGESTS), min_size=1, max_size=3, unique=True))
        made = assignment(f"a{number}", variant("q4", draw(st.sampled_from(["gguf", "exotic"])), *files))
        made.model.name = f"m{number}"
        made.model.digest = f"{number}" * 64
        made.phase = draw(st.sampled_from([pb.ASSIGNMENT_PHASE_ACTIVE, pb.ASSIGNMENT_PHASE_PREFETCH]))
        assignments.append(made)
    on_disk = draw(st.sets(st.sampled_from(DIGESTS)))
    verified = {digest for digest in on_disk if draw(st.booleans())}
    views = draw(st.sets(st.tuples(st.sampled_from(["0" * 64, "1" * 64, "9" * 64]), st.just("q4"))))
    actual = Actual(
        verified=dict.fromkeys(verified, 10),
        unverified=dict.fromkeys(on_disk - verified, 10),
        partial=dict.fromkeys(draw(st.sets(st.sampled_from(DIGESTS))) - on_disk, 1),
        views=views,
        linked={view for view in views if draw(st.booleans())},
    )
    return document(*assignments), actual


def apply(actual: Actual, step: object) -> Actual:
    """What the loop's actions do, on values."""
    match step:
        case Verify(sha256):
            unverified = {key: size for key, size in actual.unverified.items() if key != sha256}
            return replace(actual, unverified=unverified, verified={**actual.verified, sha256: 10})
        case Fetch(sha256, size):
            partial = {key: value for key, value in actual.partial.items() if key != sha256}
            return replace(actual, partial=partial, verified={**actual.verified, sha256: size})
        case Link(digest, name):
            return replace(actual, views=actual.views | {(digest, name)}, linked=actual.linked | {(digest, name)})
        case RemoveView(digest, name):
            return replace(actual, views=actual.views - {(digest, name)}, linked=actual.linked - {(digest, name)})
        case RemovePartial(sha256):
            return replace(actual, partial={key: value for key, value in actual.partial.items() if key != sha256})
        case RemoveBlob(sha256):
            return replace(actual, verified={key: size for key, size in actual.verified.items() if key != sha256})
    raise AssertionError(step)


@settings(max_examples=60, deadline=None)
@given(worlds(), st.data())
def test_any_prefix_of_a_plan_is_safe_and_planning_again_ends(
    world: tuple[pb.NodeDocument, Actual], data: st.DataObject
) -> None:
    wanted, actual = world
    for _ in range(60):
        current = plan(wanted, 1, actual, LIMITS, 0.0)
        # Safe: what is offered to the host has all its files verified and its view in place.
        for model in current.models:
            view = (model.entry.parent.name if model.format != "gguf" else model.entry.parent.parent.name, "q4")
            assert view in actual.linked
        for step in current.steps:
            assert not (isinstance(step, RemoveBlob) and step.sha256 in current.needed)
        if not current.steps:
            break
        for step in current.steps[: data.draw(st.integers(1, len(current.steps)))]:
            actual = apply(actual, step)
    assert current.steps == ()
    staged = {status.id for status in current.statuses if is_true(status.conditions[0])}
    assert staged == set(current.chosen)
    assert actual.views == {(item.model.digest, "q4") for item in wanted.assignments if item.id in current.chosen}


@settings(max_examples=40, deadline=None)
@given(worlds())
def test_the_order_of_assignments_does_not_matter_to_what_is_offered(world: tuple[pb.NodeDocument, Actual]) -> None:
    wanted, actual = world
    turned = document(*reversed(wanted.assignments))
    forth, back = plan(wanted, 1, actual, LIMITS, 0.0), plan(turned, 1, actual, LIMITS, 0.0)
    assert forth.models == back.models
    assert forth.needed == back.needed
    assert forth.ready == back.ready


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(st.sampled_from(DIGESTS), st.integers(1, 100)),
    st.sets(st.sampled_from(DIGESTS)),
    st.integers(0, 300),
    st.builds(Room, st.integers(0, 400), st.integers(0, 400), st.integers(0, 100)),
)
def test_pruning_never_takes_what_is_needed_and_no_more_than_must(
    sizes: dict[str, int], needed: set[str], incoming: int, room: Room
) -> None:
    victims = prune(sizes, {}, needed, incoming, room)
    assert not set(victims) & needed
    if victims:
        # Without the last victim it would not have been enough.
        freed = sum(sizes[victim] for victim in victims[:-1])
        over_cache = sum(sizes.values()) - freed + incoming > room.cache_bytes > 0
        assert over_cache or incoming + room.reserve_bytes > room.free_bytes + freed


def test_refusals_say_what_to_do() -> None:
    reason, sentence = refusal(500, 100, Room(400, 10_000, 0)) or ("", "")
    assert reason == "CacheTooSmall"
    assert "raise it" in sentence
    assert refusal(500, 100, Room(0, 10_000, 0)) is None


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 10_000), st.floats(0, 1, exclude_max=True))
def test_download_retries_are_bounded(attempts: int, chance: float) -> None:
    assert 0.5 <= retry_delay_s(attempts, chance) <= 300.0
