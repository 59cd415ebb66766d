"""The session and the relay against a control plane that speaks the real protocol over real mutual TLS."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc.aio

from agentd.board import StatusBoard
from agentd.desired import DesiredOwner
from agentd.device.clock import boottime_s
from agentd.identity.files import Identity
from agentd.session.exchange import WINDOW
from agentd.session.relay import Relay
from agentd.session.session import Callbacks, Session
from agentd.store.database import Database
from agentd.store.desired import DesiredStore
from slmfleet.v1 import relay_pb2, session_pb2
from slmfleet.v1 import state_pb2 as pb
from tests.support.fake_controlplane import FakeControlPlane, desired_state, running


class Node:
    """A session with its surroundings, without the rest of agentd."""

    def __init__(self, identity: Identity, database: Database, desired: DesiredOwner, app: Any) -> None:
        self.identity = identity
        self.database = database
        self.desired = desired
        self.board = StatusBoard()
        self.welcomes: list[session_pb2.Welcome] = []
        self.acks: asyncio.Queue[session_pb2.OutboxAck] = asyncio.Queue()
        callbacks = Callbacks(
            welcomed=self.welcomes.append,
            acknowledged=self.acks.put,
            relay=Relay(app).serve if app else self._no_relay,
            in_flight=lambda: 7,
            hello_facts=self._facts,
        )
        hello = {"boot_id": "b1", "agentd_version": "1", "features": ["agents"], "local_api": "127.0.0.1:1"}
        self.session = Session(lambda: self.identity, desired, self.board, callbacks, hello)

    async def _no_relay(self, channel: grpc.aio.Channel) -> None:
        await asyncio.Event().wait()

    async def _facts(self) -> tuple[pb.Inventory, list[str]]:
        return pb.Inventory(hostname="h"), ["aa"]


@contextlib.asynccontextmanager
async def connected(tmp_path: Path, app: Any = None, **times: float) -> AsyncIterator[tuple[FakeControlPlane, Node]]:
    """A control plane and a node whose session runs."""
    async with FakeControlPlane(tmp_path, **times) as plane:
        identity = await plane.enrol(tmp_path / "state")
        database = await Database.open(tmp_path / "store.db")
        store = DesiredStore(database)
        node = Node(identity, database, DesiredOwner(store, await store.load()), app)
        async with running(node.session.run(), "session"):
            yield plane, node
        await database.close()


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(60):
            await test()

    asyncio.run(bounded())


def document(label: str = "a") -> pb.NodeDocument:
    return pb.NodeDocument(labels={"x": label})


def status(key: str, reason: str = "Waiting") -> pb.AssignmentStatus:
    return pb.AssignmentStatus(id=key, conditions=[pb.Condition(type="Staged", reason=reason)])


def reports(ups: list[Any]) -> list[session_pb2.StatusReport]:
    return [up.statuses for up in ups if up.WhichOneof("message") == "statuses"]


def test_hello_desired_state_applied_and_it_is_durable_before_that(tmp_path: Path) -> None:
    async def test() -> None:
        async with connected(tmp_path) as (plane, node):
            link = await plane.connection()
            assert link.node_id == "id-n1"
            hello = link.hello
            assert (hello.boot_id, hello.observed_generation, list(hello.artifacts)) == ("b1", 0, ["aa"])
            assert (hello.inventory.hostname, hello.local_api) == ("h", "127.0.0.1:1")
            offered = desired_state(document(), 4)
            link.send(desired_state=offered)
            applied = await link.applied(4)
            assert (applied.timeline, applied.sha256, applied.refused) == ("t1", offered.sha256, "")
            # Another reader of the same file sees it: it was committed, not only kept in memory.
            other = await Database.open(tmp_path / "store.db")
            found = await DesiredStore(other).load()
            assert found is not None
            assert found.generation == 4
            await other.close()
            assert node.desired.generation == 4
            ping = await link.up.wait(lambda up: up.WhichOneof("message") == "ping")
            assert ping.ping.in_flight == 7

    run(test)


def test_refused_documents_change_nothing(tmp_path: Path) -> None:
    async def test() -> None:
        async with connected(tmp_path) as (plane, node):
            link = await plane.connection()
            link.send(desired_state=desired_state(document("a"), 5))
            await link.applied(5)
            torn = desired_state(document("b"), 6)
            torn.sha256 = b"\x00" * 32
            link.send(desired_state=torn)
            assert "SHA-256" in (await link.applied(6)).refused
            link.send(desired_state=desired_state(document("b"), 7, features=("teleport",)))
            assert "teleport" in (await link.applied(7)).refused
            link.send(desired_state=desired_state(document("b"), 4))
            assert "older" in (await link.applied(4)).refused
            assert node.desired.generation == 5
            assert node.desired.conflict == ""
            second = len(link.up.items)
            link.send(desired_state=desired_state(document("b"), 5))
            again = await link.up.wait(lambda up: up.WhichOneof("message") == "applied", after=second)
            assert again.applied.refused
            assert "do not fit" in node.desired.conflict

    run(test)


def test_conflict_is_held_until_a_new_state_is_accepted(tmp_path: Path) -> None:
    async def test() -> None:
        async with connected(tmp_path) as (plane, node):
            link = await plane.connection()
            link.send(conflict=session_pb2.Conflict(timeline="t1", generation=1, reason="the node is ahead"))
            link.send(operation=session_pb2.Operation(id="o1", kind="ping"))
            await link.up.wait(lambda up: up.WhichOneof("message") == "operation_result")
            assert node.desired.conflict == "the node is ahead"
            link.send(desired_state=desired_state(document(), 1, timeline="t2"))
            await link.applied(1)
            assert node.desired.conflict == ""

    run(test)


def test_statuses_are_complete_after_hello_then_only_what_changed(tmp_path: Path) -> None:
    async def test() -> None:
        async with connected(tmp_path) as (plane, node):
            link = await plane.connection()
            first = await link.up.wait(lambda up: up.WhichOneof("message") == "statuses")
            assert first.statuses.complete
            node.board.put_up([status("a1"), status("a2")], 1000)
            await link.condition("a2", "Staged", reason="Waiting")
            assert reports(link.up.items)[-1].complete  # the set changed
            seen = len(link.up.items)
            node.board.put_up([status("a1", "Verified"), status("a2")], 2000)
            await link.condition("a1", "Staged", reason="Verified")
            (change,) = reports(link.up.items[seen:])
            assert ([item.id for item in change.statuses], change.complete) == (["a1"], False)

    run(test)


def test_a_new_session_begins_with_what_is_stored(tmp_path: Path) -> None:
    async def test() -> None:
        async with connected(tmp_path) as (plane, node):
            link = await plane.connection()
            link.send(desired_state=desired_state(document(), 3))
            await link.applied(3)
            node.board.put_up([status("a1")], 1000)
            await link.condition("a1", "Staged")
            link.close()
            second = await plane.connection(2)
            assert (second.hello.timeline, second.hello.observed_generation) == ("t1", 3)
            assert [item.id for item in second.hello.statuses] == ["a1"]
            first = await second.up.wait(lambda up: up.WhichOneof("message") == "statuses")
            assert (len(first.statuses.statuses), first.statuses.complete) == (1, True)

    run(test)


def test_the_session_returns_after_the_server_was_away(tmp_path: Path) -> None:
    async def test() -> None:
        async with connected(tmp_path) as (plane, _node):
            await plane.connection()
            await plane.stop_servers()
            await plane.start_servers()
            second = await plane.connection(2)
            assert second.epoch == 2

    run(test)


def test_a_silent_server_is_given_up_within_the_ttl(tmp_path: Path) -> None:
    async def test() -> None:
        async with connected(tmp_path, beat_s=0.1, ttl_s=1.0) as (plane, _node):
            link = await plane.connection()
            await link.up.wait(lambda up: up.WhichOneof("message") == "ping")
            plane.answer_pings = False
            began_s = boottime_s()
            second = await plane.connection(2)
            assert second.epoch == 2
            # One TTL of silence and at most the first two steps of the back-off.
            assert 0.8 <= boottime_s() - began_s <= 4.0

    run(test)


def test_come_back_in_is_obeyed(tmp_path: Path) -> None:
    async def test() -> None:
        async with connected(tmp_path) as (plane, _node):
            link = await plane.connection()
            plane.instead_of_welcome = session_pb2.Down(
                come_back_in=session_pb2.ComeBackIn(seconds=0.5, reason="too many at once")
            )
            began_s = boottime_s()
            link.send(come_back_in=session_pb2.ComeBackIn(seconds=0.5, reason="restarting"))
            await plane.connection(2)
            assert boottime_s() - began_s >= 1.0  # told twice: once in the session, once in answer to Hello

    run(test)


def test_operations_are_answered_once_and_expired_ones_dropped(tmp_path: Path) -> None:
    async def test() -> None:
        async with connected(tmp_path) as (plane, _node):
            link = await plane.connection()
            late = session_pb2.Operation(id="late", kind="ping")
            late.expires_at.FromSeconds(1)
            for operation in (late, session_pb2.Operation(id="o1", kind="ping"), session_pb2.Operation(id="o2")):
                link.send(operation=operation)
            await link.up.wait(lambda up: up.operation_result.id == "o2")
            results = {
                up.operation_result.id: up.operation_result.succeeded
                for up in link.up.items
                if up.WhichOneof("message") == "operation_result"
            }
            assert results == {"o1": True, "o2": False}

    run(test)


def test_acknowledgements_and_unknown_messages_are_taken(tmp_path: Path) -> None:
    async def test() -> None:
        async with connected(tmp_path) as (plane, node):
            link = await plane.connection()
            link.send()
            ack = session_pb2.OutboxAck(stream="events", epoch=2, ranges=[session_pb2.Range(first=1, last=3)])
            link.send(outbox_ack=ack)
            assert await node.acks.get() == ack
            assert node.welcomes[0].endpoints == plane.endpoints

    run(test)


def test_a_node_without_its_certificate_gets_nowhere(tmp_path: Path) -> None:
    async def test() -> None:
        async with FakeControlPlane(tmp_path / "a") as plane, FakeControlPlane(tmp_path / "b") as other:
            stranger = await other.enrol(tmp_path / "state")
            stranger.ca_file.write_bytes(plane.pki.ca_pem)
            database = await Database.open(tmp_path / "store.db")
            node = Node(stranger, database, DesiredOwner(DesiredStore(database), None), None)
            node.identity = type(stranger)(
                stranger.folder, "id-n1", "n1", type(stranger.endpoints)(plane.endpoints.node_api, "", ""), 0, 0
            )
            async with running(node.session.run(), "session"):
                while node.session.link.attempts < 2:  # noqa: ASYNC110  # an attempt counts itself
                    await asyncio.sleep(0.01)
            assert plane.connections.items == []
            assert "UNAVAILABLE" in node.session.link.problem
            await database.close()

    run(test)


# --- the relay --------------------------------------------------------------------------------------------------------


class App:
    """Echoes; /big answers a lot; /wait waits until its caller leaves; /fail raises."""

    def __init__(self) -> None:
        self.begun = asyncio.Event()
        self.left = asyncio.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/fail":
            raise RuntimeError("a bug in the application")
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message["body"], message["more_body"]
        await send({"type": "http.response.start", "status": 200, "headers": [(b"x-a", b"b")]})
        if scope["path"] == "/wait":
            self.begun.set()
            assert (await receive())["type"] == "http.disconnect"
            self.left.set()
            return
        facts = {"method": scope["method"], "relay": "slmfleet.relay" in scope["extensions"], "length": len(body)}
        answer = b"z" * 500_000 if scope["path"] == "/big" else json.dumps(facts).encode()
        await send({"type": "http.response.body", "body": answer, "more_body": False})


def test_relayed_requests_reach_the_application(tmp_path: Path) -> None:
    async def test() -> None:
        async with connected(tmp_path, App()) as (plane, _node):
            relay = await plane.relay()
            status_code, body = await relay.request("POST", "/x", b"hello", content_type="text/plain")
            assert (status_code, json.loads(body)) == (200, {"method": "POST", "relay": True, "length": 5})
            answers = await asyncio.gather(*(relay.request("GET", "/big") for _ in range(5)))
            assert [len(answer) for _, answer in answers] == [500_000] * 5

    run(test)


def test_a_slow_reader_stalls_nobody_else(tmp_path: Path) -> None:
    async def test() -> None:
        async with connected(tmp_path, App()) as (plane, _node):
            relay = await plane.relay()
            slow = relay.open("GET", "/big")
            relay.send(slow, end=relay_pb2.End())
            got = 0
            assert (await relay.next(slow)).WhichOneof("frame") == "head"
            while got < WINDOW:
                got += len((await relay.next(slow)).data.body)
            assert got == WINDOW
            assert len((await relay.request("GET", "/big"))[1]) == 500_000
            assert relay.frames[slow].empty()

    run(test)


def test_large_uploads_are_granted_as_they_are_read(tmp_path: Path) -> None:
    async def test() -> None:
        async with connected(tmp_path, App()) as (plane, _node):
            relay = await plane.relay()
            upload = relay.open("POST", "/x")
            for _ in range(4):
                relay.send(upload, data=relay_pb2.Data(body=b"u" * WINDOW))
                granted = 0
                while granted < WINDOW:
                    granted += (await relay.next(upload)).window.bytes
            relay.send(upload, end=relay_pb2.End())
            frames = [await relay.next(upload) for _ in range(3)]
            assert [frame.WhichOneof("frame") for frame in frames] == ["head", "data", "end"]
            assert json.loads(frames[1].data.body)["length"] == 4 * WINDOW

    run(test)


def test_a_reset_ends_the_work(tmp_path: Path) -> None:
    async def test() -> None:
        app = App()
        async with connected(tmp_path, app) as (plane, _node):
            relay = await plane.relay()
            request = relay.open("GET", "/wait")
            relay.send(request, end=relay_pb2.End())
            await app.begun.wait()
            relay.send(request, reset=relay_pb2.Reset(code="cancelled"))
            await app.left.wait()
            # The stream lives on, and frames of the forgotten exchange do no harm.
            relay.send(request, data=relay_pb2.Data(body=b"late"))
            assert (await relay.request("GET", "/x"))[0] == 200

    run(test)


def test_failures_are_resets_with_a_code(tmp_path: Path) -> None:
    async def test() -> None:
        async with connected(tmp_path, App()) as (plane, _node):
            relay = await plane.relay()
            broken = relay.open("GET", "/fail")
            assert (await relay.next(broken)).reset.code == "internal"
            late = relay.open("GET", "/wait", timeout_s=0.05)
            relay.send(late, end=relay_pb2.End())
            assert (await relay.next(late)).WhichOneof("frame") == "head"
            assert (await relay.next(late)).reset.code == "timeout"
            greedy = relay.open("POST", "/x")
            relay.send(greedy, data=relay_pb2.Data(body=b"g" * (WINDOW + 1)))
            assert (await relay.next(greedy)).reset.code == "refused"

    run(test)


def test_the_relay_reopens_while_the_session_lives(tmp_path: Path) -> None:
    async def test() -> None:
        async with connected(tmp_path, App()) as (plane, _node):
            first = await plane.relay()
            assert (await first.request("GET", "/x"))[0] == 200
            first.down.put_nowait(None)
            second = await plane.relay(2)
            assert (await second.request("GET", "/x"))[0] == 200
            assert len(plane.connections.items) == 1

    run(test)
