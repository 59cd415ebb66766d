"""Placement: what goes where and why, move by move, and what must hold for any fleet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from controlplane.controllers.placement import status_of
from controlplane.domain.candidates import MEMORY_SHARE, Filter, Rejection, choose_variant, memory_need
from controlplane.domain.explain import explain
from controlplane.domain.failover import Storm
from controlplane.domain.fleet import Deployment, Fleet, Node, Replica, Revision, Variant, effective_revision
from controlplane.domain.liveness import NodeState
from controlplane.domain.placement import Keep, Place, Plan, Remove, Revise, plan
from controlplane.domain.selectors import parse_selector

S = NodeState
NOW = 1000.0
GGUF = Variant("q4-1", "gguf", {"aa": 98_000_000})
REVISION = Revision(1, "smollm2", "1", (GGUF,))


def node(name: str, state: NodeState = S.ONLINE, **more: object) -> Node:
    values: dict = {
        "formats": frozenset({"gguf"}),
        "memory_bytes": 8 * 10**9,
        "disk_free_bytes": 50 * 10**9,
        "silent_since": 900.0 if state in (S.SUSPECT, S.DISCONNECTED, S.LOST) else None,
        **more,
    }
    return Node(id=f"id-{name}", name=name, state=state, **values)


def deployment(replicas: int = 2, name: str = "greeter", **more: object) -> Deployment:
    values: dict = {"current_revision": 1, "revisions": (REVISION,), **more}
    return Deployment(name=name, replicas=replicas, **values)


def replica(on: str, created_at: float = 0.0, ready: bool = True, **more: object) -> Replica:
    values: dict = {"revision": 1, "observed_revision": 1, "deployment": "greeter", **more}
    return Replica(
        id=f"r-{values['deployment']}-{on}",
        node_id=f"id-{on}",
        created_at=created_at,
        ready=ready,
        staged=ready,
        **values,
    )


def apply(replicas: Sequence[Replica], made: Plan, created_at: float = NOW) -> list[Replica]:
    """The replicas after the plan, as the controller would leave them."""
    after = {item.id: item for item in replicas}
    for action in made.changes:
        if isinstance(action, Remove):
            del after[action.replica_id]
        elif isinstance(action, Revise):
            after[action.replica_id] = replace(after[action.replica_id], revision=action.revision)
        else:
            name = action.node_id.removeprefix("id-")
            new = replica(name, created_at, False, deployment=action.deployment, revision=action.revision)
            assert new.id not in after, "two replicas of one deployment on one node"
            after[new.id] = new
    return list(after.values())


def moves(made: Plan) -> dict[str, list[str]]:
    """Node names by verb."""
    return {
        "place": sorted(action.node for action in made.changes if isinstance(action, Place)),
        "remove": sorted(action.node for action in made.changes if isinstance(action, Remove)),
    }


def test_replicas_go_to_the_best_nodes_with_reasons() -> None:
    nodes = [node("a"), node("b", memory_bytes=16 * 10**9), node("c", memory_bytes=32 * 10**9)]
    made = plan([deployment(2)], nodes, [], NOW)
    assert moves(made) == {"place": ["b", "c"], "remove": []}
    assert all("best of" in action.reason for action in made.changes)
    assert made.unplaced == ()
    assert made.desired == (("greeter", 2),)


def test_a_node_that_has_the_bytes_is_preferred() -> None:
    nodes = [node("a", memory_bytes=16 * 10**9), node("b")]
    other = replica("b", deployment="other")
    made = plan([deployment(1), deployment(1, "other", warm=0)], nodes, [other], NOW)
    assert moves(made)["place"] == ["b"]


def test_what_a_node_said_to_have_on_disk_counts_though_no_replica_of_it_runs_there() -> None:
    full = node("b", on_disk=frozenset({"aa"}), disk_free_bytes=10)
    made = plan([deployment(1)], [node("a"), full], [], NOW)
    assert moves(made)["place"] == ["b"]
    assert "100% of the model is on its disk" in made.changes[0].reason


def test_ties_go_to_the_first_name() -> None:
    assert moves(plan([deployment(1)], [node("b"), node("a"), node("c")], [], NOW))["place"] == ["a"]


def test_a_node_that_takes_one_now_is_counted_among_those_that_cannot_take_another() -> None:
    [unplaced] = plan([deployment(2)], [node("a")], [], NOW).unplaced
    assert unplaced.reason == "1 of 1 node can't take another replica: 1 running it already"


def test_a_full_disk_is_no_unknown_disk_and_the_sentence_says_what_to_do() -> None:
    fleet = Fleet([deployment(1)], [node("a", disk_free_bytes=0), node("b", disk_free_bytes=None)], [], NOW)
    full, unknown = explain("greeter", fleet)
    assert (full.chosen, unknown.chosen) == (False, True)
    assert full.reason == (
        "its disk has 0 B free, too little for 98.0 MB of models to fetch and 268.4 MB that stay free: make room there"
    )


def test_what_a_node_complains_of_is_told_wherever_one_looks() -> None:
    trouble = "the disk has 20.8 MB free; this download needs 98.4 MB: free some space"
    held = [replica("a", ready=False, trouble=trouble), replica("b", ready=False, trouble="the same")]
    fleet = Fleet([deployment(2)], [node("a"), node("b")], held, NOW)
    assert explain("greeter", fleet)[0].reason.startswith(f"degraded: {trouble}")
    made = plan(fleet.deployments, fleet.nodes, fleet.replicas, NOW)
    message = status_of(fleet.deployments[0], fleet, made)["message"]
    assert message == f"0 of 2 replicas are ready; a: {trouble} (and 1 more like it)"
    healthy = Fleet([deployment(1)], [node("a")], [replica("a")], NOW)
    made = plan(healthy.deployments, healthy.nodes, healthy.replicas, NOW)
    assert status_of(healthy.deployments[0], healthy, made)["message"] == ""


def test_unplaced_counts_per_filter() -> None:
    nodes = [
        node("a", labels={"tier": "demo"}, drained=True),
        node("b", labels={"tier": "demo"}, state=S.SUSPECT),
        node("c"),
        node("d", labels={"tier": "demo"}, formats=frozenset({"onnx-genai"})),
        node("e", labels={"tier": "demo"}, memory_bytes=150_000_000),
        node("f", labels={"tier": "demo"}, disk_free_bytes=10**8),
        node("g", labels={"tier": "demo"}),
        node("h", labels={"tier": "demo"}, max_replicas=1),
    ]
    wished = deployment(3, selectors=(parse_selector("tier=demo"),))
    other = replica("h", deployment="other")
    made = plan([wished, deployment(1, "other")], nodes, [other], NOW)
    assert moves(made) == {"place": ["g"], "remove": []}
    [unplaced] = made.unplaced
    assert unplaced.count == 2
    for part in (
        "8 of 8 nodes can't take another replica",
        "1 running it already",
        "1 not selected by its labels",
        "1 drained",
        "1 not online",
        "1 without a backend",
        "1 short of memory",
        "1 short of disk",
        "1 at their limit",
    ):
        assert part in unplaced.reason


def test_no_nodes_at_all_is_a_sentence() -> None:
    assert plan([deployment(1)], [], [], NOW).unplaced[0].reason == "no node is enrolled"


def test_a_model_that_is_not_ready_places_nothing_and_says_why() -> None:
    waiting = deployment(2, revisions=(replace(REVISION, not_ready="model smollm2@1 is being fetched"),))
    made = plan([waiting], [node("a"), node("b")], [], NOW)
    assert made.changes == ()
    assert (made.unplaced[0].count, made.unplaced[0].reason) == (2, "model smollm2@1 is being fetched")


# --- failover ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", [S.SUSPECT, S.DISCONNECTED, S.RECONCILING])
def test_a_node_that_may_come_back_keeps_its_replica(state: NodeState) -> None:
    made = plan([deployment(2)], [node("a"), node("b", state), node("c")], [replica("a"), replica("b")], NOW)
    assert made.changes == ()


def test_a_lost_replica_is_replaced_and_goes_when_the_replacement_serves() -> None:
    nodes = [node("a"), node("b", S.LOST), node("c")]
    replicas = [replica("a"), replica("b")]
    first = plan([deployment(2)], nodes, replicas, NOW)
    assert moves(first) == {"place": ["c"], "remove": []}
    assert "b is lost (silent for 100 s)" in first.changes[0].reason
    replicas = apply(replicas, first)
    assert plan([deployment(2)], nodes, replicas, NOW).changes == ()
    replicas = [replace(item, ready=True) for item in replicas]
    assert moves(plan([deployment(2)], nodes, replicas, NOW)) == {"place": [], "remove": ["b"]}


def test_a_lost_node_that_returns_first_keeps_its_replica() -> None:
    nodes = [node("a"), node("b"), node("c")]
    replicas = [replica("a"), replica("b"), replica("c", 500.0, ready=False)]
    assert moves(plan([deployment(2)], nodes, replicas, NOW)) == {"place": [], "remove": ["c"]}


def test_a_lost_node_that_returns_late_finds_its_replica_moved_for_good() -> None:
    nodes = [node("a"), node("b"), node("c")]
    assert plan([deployment(2)], nodes, [replica("a"), replica("c", 500.0)], NOW).changes == ()


def test_on_disconnect_keep_waits_for_the_node() -> None:
    nodes = [node("a"), node("b", S.LOST), node("c")]
    made = plan([deployment(2, on_disconnect="keep")], nodes, [replica("a"), replica("b")], NOW)
    assert made.changes == ()
    assert any("onDisconnect is keep" in action.reason for action in made.actions)


def test_a_storm_moves_nothing_but_others_are_still_replaced() -> None:
    storm = Storm(3, 5, began=890.0, ended=910.0)
    nodes = [node("a", S.LOST), node("b", S.LOST), node("c", S.LOST), node("d"), node("e")]
    replicas = [replica("a"), replica("b")]
    made = plan([deployment(2)], nodes, replicas, NOW, [storm])
    assert made.changes == ()
    assert any("fell silent at about the same time" in action.reason for action in made.actions)
    earlier = [replace(nodes[0], silent_since=100.0), *nodes[1:]]
    assert len(moves(plan([deployment(2)], earlier, replicas, NOW, [storm]))["place"]) == 1


def test_with_nowhere_to_go_a_lost_replica_waits_for_its_node() -> None:
    made = plan([deployment(2)], [node("a"), node("b", S.LOST)], [replica("a"), replica("b")], NOW)
    assert made.changes == ()
    assert made.unplaced[0].count == 1


# --- operators' wishes ---------------------------------------------------------------------------------------------


def test_a_drained_node_hands_over_before_it_lets_go() -> None:
    nodes = [node("a", S.DRAINED, drained=True), node("b")]
    replicas = [replica("a")]
    first = plan([deployment(1)], nodes, replicas, NOW)
    assert moves(first) == {"place": ["b"], "remove": []}
    replicas = [replace(item, ready=True) for item in apply(replicas, first)]
    assert moves(plan([deployment(1)], nodes, replicas, NOW)) == {"place": [], "remove": ["a"]}


def test_a_selector_that_no_longer_matches_moves_the_replica_without_a_gap() -> None:
    wished = deployment(1, selectors=(parse_selector("hw=nuc"),))
    nodes = [node("a", labels={"hw": "pi5"}), node("b", labels={"hw": "nuc"})]
    replicas = [replica("a")]
    first = plan([wished], nodes, replicas, NOW)
    assert moves(first) == {"place": ["b"], "remove": []}
    replicas = [replace(item, ready=True) for item in apply(replicas, first)]
    assert moves(plan([wished], nodes, replicas, NOW))["remove"] == ["a"]
    # Where no node matches at all, it must go all the same.
    assert moves(plan([wished], nodes[:1], [replica("a")], NOW))["remove"] == ["a"]


def test_scale_down_takes_the_not_ready_then_the_lost_then_the_newest() -> None:
    nodes = [node("a"), node("b"), node("c"), node("d", S.LOST)]
    replicas = [replica("a", 1.0), replica("b", 2.0), replica("c", 3.0, ready=False), replica("d", 0.0)]
    for wanted, removed in ((3, ["d"]), (2, ["c", "d"]), (1, ["b", "c", "d"]), (0, ["a", "b", "c", "d"])):
        made = plan([deployment(wanted, on_disconnect="keep")], nodes, replicas, NOW)
        assert moves(made)["remove"] == removed


def test_a_deleted_deployment_and_a_removed_node_take_their_replicas_along() -> None:
    made = plan([deployment(1)], [node("a")], [replica("a", deployment="gone"), replica("z")], NOW)
    assert sorted(action.replica_id for action in made.changes if isinstance(action, Remove)) == [
        "r-gone-a",
        "r-greeter-z",
    ]


def test_every_node() -> None:
    wished = deployment(mode="every_node", selectors=(parse_selector("tier=demo"),), on_disconnect="keep")
    demo = {"tier": "demo"}
    nodes = [
        node("a", labels=demo),
        node("b", labels=demo),
        node("c"),
        node("d", S.LOST, labels=demo),
        node("e", S.DISCONNECTED, labels=demo),
    ]
    made = plan([wished], nodes, [replica("b"), replica("c"), replica("d")], NOW)
    assert moves(made) == {"place": ["a"], "remove": ["c"]}
    assert made.desired == (("greeter", 4),)
    assert [(item.count, item.reason) for item in made.unplaced] == [(1, "1 of 4 nodes can't run it: 1 not online")]


# --- revisions -----------------------------------------------------------------------------------------------------


def test_replicas_move_to_the_current_revision_where_they_are() -> None:
    wished = deployment(1, current_revision=2, revisions=(REVISION, replace(REVISION, number=2)))
    made = plan([wished], [node("a"), node("b")], [replica("a")], NOW)
    assert [type(action) for action in made.changes] == [Revise]
    assert plan([wished], [node("a"), node("b")], apply([replica("a")], made), NOW).changes == ()


def test_the_old_revision_runs_until_the_new_model_is_there() -> None:
    new = Revision(2, "smollm2", "2", (), not_ready="model smollm2@2 is being fetched")
    wished = deployment(2, current_revision=2, revisions=(REVISION, new))
    revision = effective_revision(wished, node("a"))
    assert revision is not None
    assert revision.number == 1
    made = plan([wished], [node("a"), node("b")], [replica("a")], NOW)
    assert [(type(action), action.revision) for action in made.changes if isinstance(action, Place)] == [(Place, 1)]


# --- capacity ------------------------------------------------------------------------------------------------------


def test_the_variant_suits_the_device_and_one_that_runs_stays() -> None:
    q4, q6, q8 = (
        Variant(name, "gguf", {name: size * 10**9}, name) for name, size in (("Q4_K_M", 2), ("Q6_K", 3), ("Q8_0", 4))
    )
    every = (q8, q4, q6)
    pi, desktop = node("a", cores=4), node("a", cores=8, memory_bytes=16 * 10**9)
    graphics = node("a", cores=8, accelerators=frozenset({"nvidia"}))
    assert [choose_variant(item, every) for item in (pi, desktop, graphics)] == [q4, q6, q8]
    assert choose_variant(pi, every, "Q8_0") == q8, "it runs already: no download for a gain"
    assert choose_variant(replace(pi, memory_bytes=4 * 10**9), every, "Q8_0") == q4, "it does not fit any more"
    assert choose_variant(pi, every, "gone") == q4


def test_memory_is_counted_for_the_variant_that_runs() -> None:
    """A replica holds 4 GB by an earlier choice; what the best choice would hold must not be taken for it."""
    large, small = Variant("l", "gguf", {"l": 4 * 10**9}, "Q8_0"), Variant("s", "gguf", {"s": 10**9}, "Q4_0")
    both = Revision(1, "m", "1", (large, small))
    other = Revision(1, "n", "1", (Variant("v", "gguf", {"v": 3 * 10**9}),))
    wished = [deployment(1, "first", revisions=(both,)), deployment(1, "second", revisions=(other,))]
    nodes = [node("a", cores=4)]
    held = replica("a", deployment="first", variant="l", variant_of="m@1")
    assert "short of memory" in plan(wished, nodes, [held], NOW).unplaced[0].reason
    assert plan(wished, nodes, [replace(held, variant="s")], NOW).unplaced == ()


def test_a_variant_that_fits_is_chosen() -> None:
    small, large, onnx = (
        Variant("s", "gguf", {"s": 10**8}),
        Variant("l", "gguf", {"l": 10**10}),
        Variant("o", "onnx-genai"),
    )
    assert choose_variant(node("a"), (onnx, large, small)) == small
    rejected = choose_variant(node("a"), (large,))
    assert isinstance(rejected, Rejection)
    assert rejected.filter is Filter.MEMORY
    assert choose_variant(node("a", formats=frozenset()), (onnx,)) == onnx


def test_models_that_stay_loaded_add_up_and_others_take_turns() -> None:
    one = node("a", memory_bytes=1_000_000_000)
    many = [
        deployment(
            1,
            f"d{number}",
            revisions=(Revision(1, f"m{number}", "1", (Variant("v", "gguf", {str(number): 300_000_000}),)),),
        )
        for number in range(4)
    ]
    assert len(moves(plan(many, [one], [], NOW))["place"]) == 1
    assert len(moves(plan([replace(item, warm=0) for item in many], [one], [], NOW))["place"]) == 4
    # One worker serves every deployment of the same model.
    same = [replace(item, revisions=many[0].revisions) for item in many]
    assert len(moves(plan(same, [one], [], NOW))["place"]) == 4


# --- properties ----------------------------------------------------------------------------------------------------

NAMES = [f"n{number}" for number in range(7)]
MODELS = [
    Revision(1, f"m{number}", "1", (Variant("v", "gguf", {f"f{number}": size}),))
    for number, size in enumerate((98_000_000, 700_000_000, 3_000_000_000))
]


@dataclass(frozen=True)
class World:
    deployments: list[Deployment]
    nodes: list[Node]
    replicas: list[Replica]
    storms: list[Storm]

    def plan(self, replicas: Sequence[Replica] | None = None, nodes: Sequence[Node] | None = None) -> Plan:
        return plan(
            self.deployments,
            self.nodes if nodes is None else nodes,
            self.replicas if replicas is None else replicas,
            NOW,
            self.storms,
        )


@st.composite
def worlds(draw: st.DrawFn) -> World:
    def a_node(name: str) -> Node:
        state = draw(st.sampled_from([S.ONLINE, S.ONLINE, S.ONLINE, S.SUSPECT, S.LOST, S.RECONCILING, S.DRAINED]))
        return node(
            name,
            state,
            labels={"site": draw(st.sampled_from(["lyon", "turin"]))},
            drained=state is S.DRAINED,
            memory_bytes=draw(st.sampled_from([0, 512 * 10**6, 2 * 10**9, 8 * 10**9])),
            max_replicas=draw(st.sampled_from([0, 0, 2])),
        )

    nodes = [a_node(name) for name in draw(st.lists(st.sampled_from(NAMES), unique=True))]
    deployments = [
        deployment(
            draw(st.integers(0, 4)),
            name,
            revisions=(draw(st.sampled_from(MODELS)),),
            mode=draw(st.sampled_from(["replicas", "replicas", "every_node"])),
            warm=draw(st.sampled_from([None, 0, 1])),
            on_disconnect=draw(st.sampled_from(["replace", "keep"])),
            selectors=(parse_selector(draw(st.sampled_from(["", "site=lyon"]))),),
        )
        for name in ("x", "y", "z")[: draw(st.integers(0, 3))]
    ]
    holders = draw(
        st.lists(st.tuples(st.sampled_from(["x", "y", "z"]), st.sampled_from(NAMES)), unique=True, max_size=10)
    )
    replicas = [replica(on, draw(st.integers(0, 5)), draw(st.booleans()), deployment=of) for of, on in holders]
    storms = draw(st.sampled_from([[], [Storm(3, 4, 890.0, 910.0)]]))
    return World(deployments, nodes, replicas, storms)


@settings(max_examples=40)
@given(worlds())
def test_planning_after_applying_is_empty(world: World) -> None:
    after = apply(world.replicas, world.plan())
    assert world.plan(after).changes == ()


@settings(max_examples=40)
@given(worlds(), st.randoms())
def test_the_order_of_the_inputs_does_not_matter(world: World, random: object) -> None:
    shuffled = World(*(list(items) for items in (world.deployments, world.nodes, world.replicas, world.storms)))
    for items in (shuffled.deployments, shuffled.nodes, shuffled.replicas):
        random.shuffle(items)  # type: ignore[attr-defined]
    assert shuffled.plan() == world.plan()


@settings(max_examples=40)
@given(worlds(), st.integers(0, 20))
def test_any_prefix_of_a_plan_leads_to_a_fleet_that_settles(world: World, length: int) -> None:
    made = world.plan()
    replicas = apply(world.replicas, Plan(made.changes[:length]))
    for _ in range(4):
        replicas = apply(replicas, world.plan(replicas))
    assert world.plan(replicas).changes == ()


@settings(max_examples=40)
@given(worlds())
def test_a_new_node_moves_nothing_that_works(world: World) -> None:
    settled = apply(world.replicas, world.plan())
    made = world.plan(settled, [*world.nodes, node("new", labels={"site": "lyon"})])
    assert all(action.node_id == "id-new" for action in made.changes if isinstance(action, Place))
    for deployment_ in world.deployments:
        mine = [action for action in made.changes if action.deployment == deployment_.name]
        # At most one replica comes; at most the one that it relieves goes.
        assert sum(isinstance(action, Place) for action in mine) <= 1


@settings(max_examples=40)
@given(worlds())
def test_serving_replicas_never_fall_below_what_is_wanted(world: World) -> None:
    nodes = {item.id: item for item in world.nodes}
    after = apply(world.replicas, world.plan())
    for wished in world.deployments:
        if wished.mode == "every_node":
            continue

        def serving(replicas: Sequence[Replica], wished: Deployment = wished) -> int:
            return sum(
                item.serves(nodes[item.node_id])
                for item in replicas
                if item.deployment == wished.name
                and item.node_id in nodes
                and wished.matches(nodes[item.node_id].labels)
                and isinstance(choose_variant(nodes[item.node_id], wished.revisions[0].variants), Variant)
            )

        assert serving(after) >= min(wished.replicas, serving(world.replicas))


@settings(max_examples=40)
@given(worlds())
def test_new_replicas_never_exceed_the_memory_that_may_be_used(world: World) -> None:
    made = world.plan()
    placed = {(action.deployment, action.node_id) for action in made.changes if isinstance(action, Place)}
    after = apply(world.replicas, made)
    by_name = {item.name: item for item in world.deployments}
    for item in world.nodes:
        if not item.memory_bytes or not any(node_id == item.id for _, node_id in placed):
            continue
        needs: Mapping[str, int] = {
            by_name[held.deployment].revisions[0].model: memory_need(by_name[held.deployment].revisions[0].variants[0])
            for held in after
            if held.node_id == item.id
            and held.deployment in by_name
            and by_name[held.deployment].warm != 0
            and isinstance(choose_variant(item, by_name[held.deployment].revisions[0].variants), Variant)
        }
        assert sum(needs.values()) <= item.memory_bytes * MEMORY_SHARE


@settings(max_examples=40)
@given(worlds())
def test_every_missing_replica_has_a_reason(world: World) -> None:
    made = world.plan()
    after = apply(world.replicas, made)
    for wished in world.deployments:
        if wished.mode == "replicas":
            held = sum(item.deployment == wished.name for item in after)
            told = sum(item.count for item in made.unplaced if item.deployment == wished.name)
            assert held + told >= wished.replicas
    assert all(item.reason and item.count > 0 for item in made.unplaced)


@settings(max_examples=40)
@given(worlds())
def test_explain_has_a_sentence_for_each_node_and_agrees_with_the_plan(world: World) -> None:
    fleet = Fleet(world.deployments, world.nodes, world.replicas, NOW)
    for wished in world.deployments:
        told = {item.node: item for item in explain(wished.name, fleet, world.storms)}
        assert set(told) == {item.name for item in world.nodes}
        assert all(item.reason for item in told.values())
        for action in world.plan().actions:
            if action.deployment == wished.name and not isinstance(action, Keep) and action.node in told:
                assert told[action.node].chosen is not isinstance(action, Remove)
