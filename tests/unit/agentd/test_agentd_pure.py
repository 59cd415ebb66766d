"""The small pure decisions: judging desired state, back-off, operations, the outbox window, renewal, tokens."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentd.agents.admission import retry_after_s
from agentd.api.prometheus import METRIC_NAMES, Snapshot, render
from agentd.desired import Accept, AlreadyStored, Refuse, judge
from agentd.device.inventory import cpu_model, limits_kind
from agentd.identity.files import renewal_at
from agentd.identity.pinning import parse_token
from agentd.identity.renewal import retry_delay_s
from agentd.models.counters import ModelCounters
from agentd.models.types import ModelKey, ModelState, ModelStatus
from agentd.session.backoff import CAP_S, invited_delay_s, reconnect_delay_s
from agentd.session.operations import REMEMBERED, Operations
from agentd.store.desired import StoredState
from agentd.store.outbox import SealedBatch, join_rows
from agentd.telemetry.ledger import Ledger
from agentd.telemetry.rows import model_samples
from agentd.telemetry.window import REPEAT_S, Window
from slmfleet.errors import UserError
from slmfleet.v1 import session_pb2, state_pb2, telemetry_pb2

# --- desired state ----------------------------------------------------------------------------------------------------


def offered(generation: int, timeline: str = "t1", text: str = "a", *features: str) -> state_pb2.DesiredState:
    document = state_pb2.NodeDocument(labels={"x": text}).SerializeToString(deterministic=True)
    return state_pb2.DesiredState(
        timeline=timeline, generation=generation, sha256=hashlib.sha256(document).digest(), document=document,
        required_features=features,
    )  # fmt: skip


def stored(generation: int, timeline: str = "t1", text: str = "a") -> StoredState:
    one = offered(generation, timeline, text)
    return StoredState(one.timeline, one.generation, one.sha256, one.document)


@pytest.mark.parametrize(
    ("have", "offer", "verdict"),
    [
        (None, offered(1), Accept),
        (stored(1), offered(2), Accept),
        (stored(5), offered(4), Refuse),
        (stored(5), offered(5), AlreadyStored),
        (stored(5), offered(1, "t2"), Accept),
        (None, offered(1, "t1", "a", "agents"), Accept),
        (None, offered(1, "t1", "a", "agents", "teleport"), Refuse),
    ],
)
def test_judge(have: StoredState | None, offer: state_pb2.DesiredState, verdict: type) -> None:
    assert type(judge(have, offer, frozenset({"agents"}))) is verdict


def test_another_content_at_the_same_generation_is_a_conflict() -> None:
    assert judge(stored(5), offered(5, text="b"), frozenset()) == Refuse(
        "generation 5 is stored here with another content: the server's history and the node's do not fit", True
    )


def test_bytes_that_do_not_match_their_hash_are_refused() -> None:
    bad = offered(1)
    bad.document += b"\x00"
    assert isinstance(judge(None, bad, frozenset()), Refuse)
    bad.sha256 = hashlib.sha256(bad.document).digest()
    assert judge(None, bad, frozenset()) == Refuse("the document can't be decoded")


# --- reconnecting -----------------------------------------------------------------------------------------------------


@settings(max_examples=50)
@given(st.integers(0, 10**6), st.floats(0, 1, exclude_max=True))
def test_reconnect_delays_have_full_jitter_and_a_cap(failures: int, chance: float) -> None:
    delay = reconnect_delay_s(failures, chance)
    assert 0 <= delay <= CAP_S
    assert reconnect_delay_s(failures, 0.0) == 0.0


def test_reconnect_bounds_double_up_to_the_cap_and_reset() -> None:
    assert [reconnect_delay_s(failures, 1.0) for failures in range(8)] == [0, 1, 2, 4, 8, 16, 30, 30]


def test_an_invitation_is_never_taken_early() -> None:
    assert invited_delay_s(10, 0.0) == 10
    assert invited_delay_s(10, 0.99) <= 12
    assert invited_delay_s(-3, 0.5) == 0


# --- operations -------------------------------------------------------------------------------------------------------


def test_operations_answer_once_and_repeat_the_answer() -> None:
    operations = Operations()
    ping = session_pb2.Operation(id="1", kind="ping")
    ping.expires_at.FromSeconds(100)
    assert operations.answer(ping, now_s=101.0) is None
    first = operations.answer(ping, now_s=99.0)
    assert first is not None
    assert first.succeeded
    # Delivered again after its time: it ran already, so the answer is known.
    assert operations.answer(ping, now_s=200.0) is first
    unknown = operations.answer(session_pb2.Operation(id="2", kind="dance"), 0.0)
    assert unknown is not None
    assert (unknown.succeeded, "'dance'" in unknown.message) == (False, True)


def test_operations_remember_a_bounded_number() -> None:
    operations = Operations()
    for number in range(REMEMBERED + 10):
        operations.answer(session_pb2.Operation(id=str(number), kind="ping"), 0.0)
    assert len(operations._answered) == REMEMBERED


# --- outbox -----------------------------------------------------------------------------------------------------------


def batch(key: int, first: int, last: int, epoch: int = 7) -> SealedBatch:
    return SealedBatch(key, "metrics", epoch, first, last, 0, "boot", b"x")


def test_the_window_bounds_what_is_on_its_way_and_repeats_what_is_not_acknowledged() -> None:
    window = Window(credit=2)
    window.publish(batch(1, 1, 10), 0.0)
    assert window.room
    window.publish(batch(2, 11, 20), 5.0)
    assert not window.room
    assert [item.id for item in window.due(REPEAT_S)] == [1]
    window.acknowledge(8, [(1, 20)], 2)
    assert len(window.sent) == 2  # another epoch
    window.acknowledge(7, [(1, 10)], 2)
    assert list(window.sent) == [2]
    window.forget()
    assert window.room


def test_one_batch_may_always_be_sent() -> None:
    window = Window()
    window.acknowledge(7, [], credit=0)
    assert window.room
    window.publish(batch(1, 1, 1), 0.0)
    assert not window.room


@settings(max_examples=40)
@given(st.lists(st.binary(max_size=300).map(lambda text: text.hex()), max_size=5))
def test_joined_rows_are_the_message_with_that_repeated_field(texts: list[str]) -> None:
    rows = [telemetry_pb2.EventRow(message=text, sequence=number) for number, text in enumerate(texts)]
    joined = join_rows(row.SerializeToString() for row in rows)
    assert list(telemetry_pb2.EventRows.FromString(joined).rows) == rows


# --- counting ---------------------------------------------------------------------------------------------------------

KEY = ModelKey("m", "1", "q4")
STATUS = ModelStatus(KEY, ModelState.READY, "gguf", 1, 5000, 0, 0, "", None, None, 2)


def test_both_readers_of_the_ledger_see_every_count() -> None:
    waiting = [ModelCounters(requests_ok=2), ModelCounters(requests_ok=3)]
    ledger = Ledger(lambda: {KEY: waiting.pop(0)} if waiting else {})
    assert ledger.totals()[KEY].requests_ok == 2
    assert ledger.since_last_row()[KEY].requests_ok == 5
    ledger.refused(KEY, "agent_queue_full")
    assert ledger.since_last_row()[KEY].requests_refused == 1
    assert ledger.since_last_row() == {}
    assert (ledger.totals()[KEY].requests_ok, ledger.totals()[KEY].requests_refused) == (5, 1)


def test_samples_name_models_that_are_gone_and_leave_empty_histograms_out() -> None:
    gone = ModelKey("n", "1", "q4")
    counters = ModelCounters(requests_ok=1)
    counters.total_s.observe(0.3)
    samples = {sample.model: sample for sample in model_samples([STATUS], {gone: counters})}
    assert (samples["n@1"].state, samples["n@1"].requests_ok) == ("gone", 1)
    assert len(samples["n@1"].total_s.counts) == len(samples["n@1"].total_s.bounds) + 1
    assert not samples["n@1"].HasField("queue_s")
    assert samples["m@1"].memory_bytes == 5000


def test_the_metrics_page_is_well_formed_and_complete() -> None:
    counters = ModelCounters(requests_ok=1, refusals={"queue_full": 2})
    counters.total_s.observe(0.3)
    odd = ModelKey('we"ird', "1", "a\\b")
    page = render(
        Snapshot(1.0, 2, True, 3, False, 4, {"Ready": 1}, 5, 6, 7, 8, 0, {odd: counters}, [STATUS])
    ).decode()  # fmt: skip
    types = [line.split()[2] for line in page.splitlines() if line.startswith("# TYPE")]
    assert types == sorted(set(types), key=types.index)
    assert set(types) == set(METRIC_NAMES)
    assert 'agentd_request_seconds_bucket{model="we\\"ird",version="1",variant="a\\\\b",le="+Inf"} 1' in page
    assert 'agentd_refusals_total{model="we\\"ird",version="1",variant="a\\\\b",reason="queue_full"} 2' in page
    assert page.endswith("\n")


# --- identity and device ----------------------------------------------------------------------------------------------


def test_renewal_is_due_at_two_thirds_and_retries_are_bounded() -> None:
    assert renewal_at(0, 90) == 60
    for reached in (False, True):
        assert 45 <= retry_delay_s(1, 0.0, 1e6, reached) <= retry_delay_s(1, 0.99, 1e6, reached) <= 75
        assert retry_delay_s(1000, 0.99, 1e6, reached) <= 3600 * 1.25
        assert retry_delay_s(1000, 0.99, 7.0, reached) == 7.0, "there is a try at the certificate's end"
    assert 1 <= retry_delay_s(1000, 0.99, 0.0, False) <= CAP_S, "nobody was met: a session would not find out either"
    assert retry_delay_s(10, 0.5, -1.0, True) == 3600, "refused: as slowly as ever"


def test_tokens_are_checked_and_never_shown() -> None:
    token = parse_token(f" slmfleet1.abc.s3cret-x.{'a' * 64}\n")
    assert token.ca_sha256 == "a" * 64
    assert "s3cret" not in repr(token)
    for text in ("", "slmfleet1.a.b.c", f"slmfleet2.a.b.{'a' * 64}", f"slmfleet1.a.b.{'A' * 64}"):
        with pytest.raises(UserError):
            parse_token(text)


def test_retry_after_follows_the_queue() -> None:
    assert retry_after_s(1, 1, 0.2) == 1
    assert retry_after_s(6, 2, 5.0) == 15
    assert retry_after_s(1000, 1, 60.0) == 60


def test_limits_kind_reads_both_versions_of_control_groups(tmp_path) -> None:  # type: ignore[no-untyped-def]
    own = tmp_path / "cgroup"
    root = tmp_path / "fs"
    assert limits_kind(root, own) == "watchdog"
    own.write_text("0::/agentd.service\n")
    group = root / "agentd.service"
    group.mkdir(parents=True)
    (root / "cgroup.controllers").write_text("cpu memory")
    (group / "cgroup.procs").write_text("")
    (group / "cgroup.controllers").write_text("cpu")
    assert limits_kind(root, own) == "watchdog"
    (group / "cgroup.controllers").write_text("cpu memory")
    assert limits_kind(root, own) == "cgroup2"
    own.write_text("3:memory:/user\n0::/\n")
    (root / "cgroup.controllers").unlink()
    (root / "memory" / "user").mkdir(parents=True)
    assert limits_kind(root, own) == "cgroup1"


def test_cpu_model_knows_x86_and_boards(tmp_path) -> None:  # type: ignore[no-untyped-def]
    file = tmp_path / "cpuinfo"
    assert cpu_model(file) == ""
    file.write_text("model name\t: Xeon\nmodel\t: 85\n")
    assert cpu_model(file) == "Xeon"
    file.write_text("processor : 0\nModel : Raspberry Pi 5\n")
    assert cpu_model(file) == "Raspberry Pi 5"
