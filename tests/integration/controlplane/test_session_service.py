"""Sessions over real mutual TLS and real Postgres."""

from __future__ import annotations

import asyncio
import datetime
import hashlib
import json
from pathlib import Path

import grpc
import pytest

from controlplane.node_api.pki import Pki
from controlplane.node_api.session import SessionPolicy
from slmfleet.v1 import session_pb2, state_pb2
from tests.support.fake_node import TIMELINE, FakeNode, FakeSession, NodeApiRig, key_pem, make_csr, node_api

SESSION = "SELECT epoch, disconnected_at IS NULL, disconnect_reason FROM node_sessions"


def test_hello_is_stored_and_welcomed(migrated_postgres_url: str, tmp_path: Path) -> None:
    async def run() -> None:
        async with node_api(migrated_postgres_url, tmp_path, SessionPolicy(beat_s=2, ttl_s=6)) as rig:
            node = await rig.enrolled("edge-1")
            inventory = state_pb2.Inventory(hostname="box", memory_bytes=1 << 30, formats=["gguf"])
            async with node.session(
                inventory=inventory, features=["a"], artifacts=["b" * 64, "no digest"], local_api="127.0.0.1:11535"
            ) as session:
                welcome = session.welcome
                assert (welcome.session_epoch, welcome.beat_s, welcome.ttl_s) == (1, 2, 6)
                assert welcome.mqtt.username == node.id
                assert len(welcome.mqtt.password) >= 24
                assert welcome.endpoints.node_api == f"127.0.0.1:{rig.ports.node_api}"
                row = (await rig.rows("SELECT boot_id, features, artifacts, local_api, inventory FROM nodes"))[0]
                assert row.artifacts == ["b" * 64]
                assert (row.boot_id, row.features, row.local_api) == ("boot-1", ["a"], "127.0.0.1:11535")
                assert row.inventory["memoryBytes"] == 1 << 30
                await rig.until(SESSION, [(1, True, "")])
            await rig.until(SESSION, [(1, False, "the connection closed")])

    asyncio.run(run())


def test_ping_moves_last_seen_and_is_answered(migrated_postgres_url: str, tmp_path: Path) -> None:
    async def run() -> None:
        async with node_api(migrated_postgres_url, tmp_path) as rig:
            node = await rig.enrolled("edge-1")
            async with node.session() as session:
                await rig.execute("UPDATE node_sessions SET last_seen_at = now() - interval '1 hour'")
                await session.send(ping=session_pb2.Ping(sequence=7, in_flight=3))
                assert (await session.expect("pong")).sequence == 7
                live = rig.api.links.session(node.id)
                assert live is not None
                assert live.in_flight == 3
                await rig.until("SELECT last_seen_at > now() - interval '5 seconds' FROM node_sessions", [(True,)])

    asyncio.run(run())


def test_who_is_let_in_is_decided_by_the_certificate(migrated_postgres_url: str, tmp_path: Path) -> None:
    async def opened(node: FakeNode) -> grpc.StatusCode:
        with pytest.raises((grpc.aio.AioRpcError, AssertionError)) as caught:
            async with node.session():
                pass
        if isinstance(caught.value, grpc.aio.AioRpcError):
            return caught.value.code()
        return grpc.StatusCode.PERMISSION_DENIED if "PERMISSION_DENIED" in str(caught.value) else grpc.StatusCode.OK

    async def run() -> None:
        async with node_api(migrated_postgres_url, tmp_path) as rig:
            # No certificate at all.
            assert await opened(FakeNode("bare", rig.pki.ca_pem, rig.ports)) is grpc.StatusCode.UNAVAILABLE

            # Signed by an authority that is not ours.
            stranger = FakeNode("stranger", rig.pki.ca_pem, rig.ports)
            forged = Pki.open(tmp_path / "other").sign_node_csr(make_csr(stranger.key), "some-id")
            stranger.chain = forged.chain_pem.encode()
            assert await opened(stranger) is grpc.StatusCode.UNAVAILABLE

            # Ours, but expired.
            late = FakeNode("late", rig.pki.ca_pem, rig.ports)
            long_ago = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=40)
            late.chain = rig.pki.sign_node_csr(make_csr(late.key), "some-id", now=long_ago).chain_pem.encode()
            assert await opened(late) is grpc.StatusCode.UNAVAILABLE

            # The server's own certificate is no client certificate.
            server = FakeNode("server", rig.pki.ca_pem, rig.ports)
            server.key = _server_key(rig.pki)
            server.chain = rig.pki.server_chain_pem
            assert await opened(server) is grpc.StatusCode.UNAVAILABLE

            # Ours, for a node that does not exist (any more), and for one that was revoked.
            unknown = FakeNode("unknown", rig.pki.ca_pem, rig.ports)
            unknown.chain = rig.pki.sign_node_csr(make_csr(unknown.key), "no-such-node").chain_pem.encode()
            assert await opened(unknown) is grpc.StatusCode.PERMISSION_DENIED
            revoked = await rig.enrolled("revoked")
            await rig.execute("UPDATE nodes SET revoked_at = now() WHERE name = 'revoked'")
            assert await opened(revoked) is grpc.StatusCode.PERMISSION_DENIED

            # With another node's certificate one is that other node, whatever one calls oneself.
            honest = await rig.enrolled("honest")
            thief = FakeNode("thief", rig.pki.ca_pem, rig.ports)
            thief.key, thief.chain = honest.key, honest.chain
            async with thief.session():
                assert rig.api.links.connected() == {honest.id}

    asyncio.run(run())


def _server_key(pki: Pki):
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    key = load_pem_private_key(pki.server_key_pem, None)
    assert key_pem(key) == pki.server_key_pem
    return key


def test_the_first_message_must_be_hello_and_come_in_time(migrated_postgres_url: str, tmp_path: Path) -> None:
    async def run() -> None:
        async with node_api(migrated_postgres_url, tmp_path, SessionPolicy(hello_timeout_s=0.2)) as rig:
            from slmfleet.v1 import session_pb2_grpc

            node = await rig.enrolled("edge-1")
            async with node.channel() as channel:
                silent = FakeSession(session_pb2_grpc.NodeSessionStub(channel).Connect())
                assert (await silent.status())[0] is grpc.StatusCode.DEADLINE_EXCEEDED
                rude = FakeSession(session_pb2_grpc.NodeSessionStub(channel).Connect())
                await rude.send(ping=session_pb2.Ping())
                assert (await rude.status())[0] is grpc.StatusCode.FAILED_PRECONDITION
            assert await rig.rows(SESSION) == []

    asyncio.run(run())


def test_a_newer_session_takes_over(migrated_postgres_url: str, tmp_path: Path) -> None:
    async def run() -> None:
        async with node_api(migrated_postgres_url, tmp_path) as rig:
            node = await rig.enrolled("edge-1")
            async with node.session() as old:
                async with node.session() as new:
                    assert new.welcome.session_epoch == 2
                    assert await old.read() is None
                    # What the older one still says reaches no table.
                    await new.send(ping=session_pb2.Ping(sequence=1))
                    assert (await new.expect("pong")).sequence == 1
                    await rig.until(SESSION, [(2, True, "")])
                    live = rig.api.links.session(node.id)
                    assert live is not None
                    assert live.epoch == 2

    asyncio.run(run())


def test_a_session_at_another_replica_takes_over_too(migrated_postgres_url: str, tmp_path: Path) -> None:
    async def run() -> None:
        async with node_api(migrated_postgres_url, tmp_path) as rig:
            node = await rig.enrolled("edge-1")
            other = rig.new_api("replica-2")
            ports = await other.start()
            async with asyncio.TaskGroup() as group:
                task = group.create_task(other.run())
                async with node.session() as old:
                    moved = FakeNode("edge-1", node.ca_pem, ports)
                    moved.id, moved.key, moved.chain = node.id, node.key, node.chain
                    async with moved.session() as new:
                        assert new.welcome.session_epoch == 2
                        assert await old.read() is None
                        await rig.until("SELECT replica_id, epoch FROM node_sessions", [("replica-2", 2)])
                task.cancel()

    asyncio.run(run())


def test_desired_state_is_sent_stored_and_reported(migrated_postgres_url: str, tmp_path: Path) -> None:
    applied = "SELECT applied_generation, refused FROM desired_states"

    async def run() -> None:
        async with node_api(migrated_postgres_url, tmp_path) as rig:
            node = await rig.enrolled("edge-1")
            await rig.set_desired(node.id, 1, b"one")
            async with node.session() as session:
                first = await session.expect("desired_state")
                assert (first.timeline, first.generation, first.document) == (TIMELINE, 1, b"one")
                await session.apply(first)
                await rig.until(applied, [(1, "")])

                # A change wakes the session by its hint.
                await rig.set_desired(node.id, 2, b"two")
                second = await session.expect("desired_state")
                assert second.generation == 2
                refusal = session_pb2.Applied(
                    timeline=TIMELINE, generation=2, sha256=second.sha256, refused="no leases"
                )
                await session.send(applied=refusal)
                await rig.until(applied, [(1, "no leases")])

            # A node that stored it in the meantime, but whose answer was lost, says so in its Hello.
            held = {"timeline": TIMELINE, "observed_generation": 2, "observed_sha256": second.sha256}
            async with node.session(**held) as again:
                await rig.until(applied, [(2, "")])
                # It lacks nothing: the next word is the answer to its ping.
                await again.send(ping=session_pb2.Ping(sequence=1))
                await again.expect("pong")

    asyncio.run(run())


def test_histories_that_do_not_fit_are_a_conflict(migrated_postgres_url: str, tmp_path: Path) -> None:
    async def run() -> None:
        async with node_api(migrated_postgres_url, tmp_path) as rig:
            node = await rig.enrolled("edge-1")
            await rig.set_desired(node.id, 3, b"three")
            ahead = {"timeline": TIMELINE, "observed_generation": 9, "observed_sha256": b"x" * 32}
            async with node.session(**ahead) as session:
                conflict = await session.expect("conflict")
                assert conflict.generation == 3
                assert "holds generation 9" in conflict.reason
                await rig.until("SELECT reason FROM events WHERE severity = 'error'", [("DesiredStateConflict",)])
                # Once the server is past the node, the node is sent its state again.
                await rig.set_desired(node.id, 10, b"ten")
                assert (await session.expect("desired_state")).generation == 10
            other = {"timeline": TIMELINE, "observed_generation": 10, "observed_sha256": b"x" * 32}
            async with node.session(**other) as session:
                assert "other content" in (await session.expect("conflict")).reason

    asyncio.run(run())


async def _assign(rig: NodeApiRig, node: FakeNode, assignment: str, deployment: str) -> None:
    await rig.execute(
        "INSERT INTO assignments (id, deployment, revision, node_id) VALUES (:id, :deployment, 1, :node)",
        id=assignment,
        deployment=deployment,
        node=node.id,
    )


def _status(assignment: str, **true: bool) -> state_pb2.AssignmentStatus:
    conditions = [
        state_pb2.Condition(
            type=name.title(),
            status=state_pb2.CONDITION_STATUS_TRUE if value else state_pb2.CONDITION_STATUS_FALSE,
            message="what\0ever",
        )
        for name, value in true.items()
    ]
    return state_pb2.AssignmentStatus(id=assignment, revision=1, observed_generation=2**64 - 1, conditions=conditions)


def test_statuses_are_stored_for_the_nodes_own_assignments(migrated_postgres_url: str, tmp_path: Path) -> None:
    stored = "SELECT assignment_id, staged, ready, warm, degraded FROM assignment_statuses ORDER BY 1"

    async def run() -> None:
        async with node_api(migrated_postgres_url, tmp_path) as rig:
            node, other = await rig.enrolled("edge-1"), await rig.enrolled("edge-2")
            await _assign(rig, node, "mine-1", "a")
            await _assign(rig, node, "mine-2", "b")
            await _assign(rig, other, "theirs", "a")
            hinted = asyncio.Event()
            async with node.session() as session:
                rig.hints.subscribe(lambda topic: hinted.set() if topic == "spec" else None)
                statuses = [_status("mine-1", staged=True, ready=False), _status("mine-2", staged=True, ready=True)]
                statuses += [_status("theirs", ready=True), _status("gone", ready=True)]
                await session.send(statuses=session_pb2.StatusReport(statuses=statuses))
                await rig.until(stored, [("mine-1", True, False, False, False), ("mine-2", True, True, False, False)])
                await asyncio.wait_for(hinted.wait(), 5)
                conditions = (await rig.rows("SELECT conditions FROM assignment_statuses ORDER BY 1"))[0].conditions
                assert [(item["type"], item["status"], item["message"]) for item in conditions] == [
                    ("Staged", "True", "whatever"),
                    ("Ready", "False", "whatever"),
                ]
                # What a complete report leaves out is gone from the node.
                report = session_pb2.StatusReport(statuses=[_status("mine-2", warm=True)], complete=True)
                await session.send(statuses=report)
                await rig.until(stored, [("mine-2", False, False, True, False)])

    asyncio.run(run())


def test_operations_are_delivered_once_a_session_and_their_results_stored(
    migrated_postgres_url: str, tmp_path: Path
) -> None:
    async def run() -> None:
        async with node_api(migrated_postgres_url, tmp_path) as rig:
            node = await rig.enrolled("edge-1")
            insert = """INSERT INTO operations (id, node_id, kind, arguments, expires_at)
                        VALUES (:id, :node, 'collect_logs', '{"lines": 5}', now() + make_interval(secs => :ttl))"""
            async with node.session() as session:
                await rig.execute(insert, id="op-1", node=node.id, ttl=60)
                await rig.execute(insert, id="op-old", node=node.id, ttl=-1)
                await rig.execute("SELECT pg_notify('slmfleet', :topic)", topic=f"node:{node.id}")
                operation = await session.expect("operation")
                assert (operation.id, operation.kind) == ("op-1", "collect_logs")
                assert json.loads(operation.arguments_json) == {"lines": 5}
                result = session_pb2.OperationResult(id="op-1", succeeded=True, message="ok", result_json=b'{"n": 1}')
                await session.send(operation_result=result)
                await rig.until(
                    "SELECT state, message, result FROM operations WHERE id = 'op-1'", [("succeeded", "ok", {"n": 1})]
                )
                # By the timer that stands behind the hints.
                await rig.until("SELECT state FROM operations WHERE id = 'op-old'", [("expired",)])

    asyncio.run(run())


def test_acknowledgements_of_telemetry_go_over_the_session(migrated_postgres_url: str, tmp_path: Path) -> None:
    async def run() -> None:
        async with node_api(migrated_postgres_url, tmp_path) as rig:
            node = await rig.enrolled("edge-1")
            assert not rig.api.links.outbox_committed(node.id, "metrics", 5, [(1, 3)])
            async with node.session() as session:
                assert rig.api.links.outbox_committed(node.id, "metrics", 5, [(1, 3), (7, 9)], credit=4)
                ack = await session.expect("outbox_ack")
                assert (ack.stream, ack.epoch, ack.credit) == ("metrics", 5, 4)
                assert [(item.first, item.last) for item in ack.ranges] == [(1, 3), (7, 9)]

    asyncio.run(run())


def test_a_node_that_is_revoked_or_deleted_loses_its_session(migrated_postgres_url: str, tmp_path: Path) -> None:
    async def run() -> None:
        async with node_api(migrated_postgres_url, tmp_path) as rig:
            revoked, deleted = await rig.enrolled("edge-1"), await rig.enrolled("edge-2")
            async with revoked.session() as first, deleted.session() as second:
                await rig.execute("UPDATE nodes SET revoked_at = now() WHERE id = :id", id=revoked.id)
                await rig.execute("DELETE FROM nodes WHERE id = :id", id=deleted.id)
                await rig.execute(
                    "SELECT pg_notify('slmfleet', 'node:' || id) FROM unnest(CAST(:ids AS text[])) AS ids (id)",
                    ids=[revoked.id, deleted.id],
                )
                for session in (first, second):
                    assert await session.read() is None
                    code, details = await session.status()
                    assert code is grpc.StatusCode.PERMISSION_DENIED
                    assert "enrol it again" in details

    asyncio.run(run())


def test_a_stop_tells_nodes_to_come_back(migrated_postgres_url: str, tmp_path: Path) -> None:
    async def run() -> None:
        async with node_api(migrated_postgres_url, tmp_path) as rig:
            node = await rig.enrolled("edge-1")
            other = rig.new_api("replica-2")
            ports = await other.start()
            there = FakeNode("edge-1", node.ca_pem, ports)
            there.id, there.key, there.chain = node.id, node.key, node.chain
            async with asyncio.TaskGroup() as group:
                task = group.create_task(other.run())
                async with there.session() as session:
                    task.cancel()
                    back = await session.expect("come_back_in")
                    assert 0 < back.seconds < 5
                    assert await session.read() is None
                    await asyncio.wait([task])
                    # A stop of the control plane is no fact about the node.
                    assert [tuple(row) for row in await rig.rows(SESSION)] == [(1, True, "")]

    asyncio.run(run())


def test_a_hundred_sessions_at_once(migrated_postgres_url: str, tmp_path: Path) -> None:
    async def run() -> None:
        async with node_api(migrated_postgres_url, tmp_path) as rig:
            token = await rig.token(uses=100)
            nodes = [FakeNode(f"edge-{number}", rig.pki.ca_pem, rig.ports) for number in range(100)]
            await asyncio.gather(*(node.enrol(token) for node in nodes))
            document = b"same for all"
            for node in nodes:
                await rig.set_desired(node.id, 1, document)

            async def live(node: FakeNode) -> None:
                async with node.session() as session:
                    state = await session.expect("desired_state")
                    assert state.sha256 == hashlib.sha256(document).digest()
                    await session.apply(state)
                    await session.send(ping=session_pb2.Ping(sequence=1))
                    await session.expect("pong")

            await asyncio.gather(*(live(node) for node in nodes))
            await rig.until("SELECT count(*) FROM desired_states WHERE applied_generation = 1", [(100,)])
            await rig.until("SELECT count(*) FROM node_sessions WHERE disconnected_at IS NOT NULL", [(100,)])

    asyncio.run(run())
