"""Enrolment and renewal over real TLS and real Postgres."""

from __future__ import annotations

import asyncio
import datetime
import hashlib
import socket
import ssl
from pathlib import Path

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from controlplane.node_api.pki import Pki
from slmfleet.v1 import enrollment_pb2, state_pb2
from tests.support.fake_node import FakeNode, make_csr, node_api

NODES = "SELECT name, labels, mqtt_password IS NOT NULL FROM nodes ORDER BY name"


def refused(caught: pytest.ExceptionInfo[grpc.aio.AioRpcError]) -> tuple[grpc.StatusCode, str]:
    return caught.value.code(), caught.value.details() or ""


def test_a_token_makes_a_node(migrated_postgres_url: str, tmp_path: Path) -> None:
    async def run() -> None:
        async with node_api(migrated_postgres_url, tmp_path) as rig:
            token = await rig.token(labels={"site": "lyon"})
            node = FakeNode("edge-1", rig.pki.ca_pem, rig.ports)
            inventory = state_pb2.Inventory(hostname="box", memory_bytes=8 << 30, formats=["gguf"])
            response = await node.enrol(token, labels={"site": "wished", "hw": "pi5"}, inventory=inventory)
            assert response.name == "edge-1"
            assert response.endpoints.node_api == f"127.0.0.1:{rig.ports.node_api}"

            leaf, authority = x509.load_pem_x509_certificates(response.certificate_chain.encode())
            assert [name.value for name in leaf.subject] == [response.node_id]
            assert leaf.public_key() == node.key.public_key()
            assert response.not_after.ToDatetime(datetime.UTC) == leaf.not_valid_after_utc
            leaf.verify_directly_issued_by(authority)
            assert response.trusted_ca.encode() == rig.pki.ca_pem

            assert [tuple(row) for row in await rig.rows(NODES)] == [("edge-1", {"site": "lyon", "hw": "pi5"}, True)]
            stored = (await rig.rows("SELECT inventory FROM nodes"))[0].inventory
            assert (stored["hostname"], stored["memoryBytes"], stored["formats"]) == ("box", 8 << 30, ["gguf"])
            assert [row.reason for row in await rig.rows("SELECT reason FROM events WHERE object = 'node/edge-1'")] == [
                "Enrolled"
            ]

    asyncio.run(run())


def test_the_chain_ends_with_the_authority_that_the_token_pins(migrated_postgres_url: str, tmp_path: Path) -> None:
    def last_of_chain(port: int) -> bytes:
        context = ssl.create_default_context()
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        context.set_alpn_protocols(["h2"])
        with socket.create_connection(("127.0.0.1", port)) as raw, context.wrap_socket(raw) as tls:
            chain = tls._sslobj.get_unverified_chain()  # type: ignore[attr-defined]
            return ssl.PEM_cert_to_DER_cert(chain[-1].public_bytes())

    async def run() -> None:
        async with node_api(migrated_postgres_url, tmp_path) as rig:
            der = await asyncio.to_thread(last_of_chain, rig.ports.enrollment)
            assert (await rig.token()).endswith("." + hashlib.sha256(der).hexdigest())

    asyncio.run(run())


def test_tokens_that_are_no_good(migrated_postgres_url: str, tmp_path: Path) -> None:
    async def run() -> None:
        async with node_api(migrated_postgres_url, tmp_path) as rig:
            used = await rig.token()
            await FakeNode("edge-1", rig.pki.ca_pem, rig.ports).enrol(used)
            expired = await rig.token(ttl_s=-1)
            revoked = await rig.token()
            await rig.execute(
                "UPDATE enrollment_tokens SET revoked_at = now() WHERE id = :id", id=revoked.split(".")[1]
            )
            parts = (await rig.token()).split(".")
            wrong_secret = ".".join([*parts[:2], "x" * 43, parts[3]])
            cases = {
                used: "token has been used",
                expired: "token has expired",
                revoked: "token was revoked",
                wrong_secret: "token is unknown",
                "garbage": "no enrolment token",
                "": "no enrolment token",
            }
            for token, sentence in cases.items():
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await FakeNode("edge-2", rig.pki.ca_pem, rig.ports).enrol(token)
                code, details = refused(caught)
                assert code is grpc.StatusCode.UNAUTHENTICATED
                assert sentence in details
                assert "make a new one" in details
            assert [row.name for row in await rig.rows(NODES)] == ["edge-1"]

    asyncio.run(run())


def test_a_refused_request_does_not_use_the_token_up(migrated_postgres_url: str, tmp_path: Path) -> None:
    def rsa_csr() -> bytes:
        key = rsa.generate_private_key(65537, 2048)
        builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
        from cryptography.hazmat.primitives import hashes

        return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.DER)

    async def run() -> None:
        async with node_api(migrated_postgres_url, tmp_path) as rig:
            await rig.enrolled("taken")
            token = await rig.token()
            good = make_csr(ec.generate_private_key(ec.SECP256R1()))
            forged = good[:-4] + bytes(4)
            cases = [
                ("taken", {}, grpc.StatusCode.ALREADY_EXISTS, 'named "taken" exists'),
                ("Not A Name", {}, grpc.StatusCode.INVALID_ARGUMENT, "is no name"),
                ("edge-1", {"labels": {"bad key": "x"}}, grpc.StatusCode.INVALID_ARGUMENT, "is no label key"),
                ("edge-1", {"csr": b"junk"}, grpc.StatusCode.INVALID_ARGUMENT, "no certificate signing request"),
                ("edge-1", {"csr": forged}, grpc.StatusCode.INVALID_ARGUMENT, "csr"),
                ("edge-1", {"csr": rsa_csr()}, grpc.StatusCode.INVALID_ARGUMENT, "P-256"),
            ]
            for name, fields, code, sentence in cases:
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await FakeNode(name, rig.pki.ca_pem, rig.ports).enrol(token, **fields)
                assert refused(caught)[0] is code, fields
                assert sentence in refused(caught)[1]
            await FakeNode("edge-1", rig.pki.ca_pem, rig.ports).enrol(token)

    asyncio.run(run())


def test_the_last_use_of_a_token_goes_to_one_node(migrated_postgres_url: str, tmp_path: Path) -> None:
    async def run() -> None:
        async with node_api(migrated_postgres_url, tmp_path) as rig:
            token = await rig.token(uses=2)
            nodes = [FakeNode(f"edge-{number}", rig.pki.ca_pem, rig.ports) for number in range(6)]
            results = await asyncio.gather(*(node.enrol(token) for node in nodes), return_exceptions=True)
            good = [result for result in results if isinstance(result, enrollment_pb2.EnrollResponse)]
            assert len(good) == 2
            assert len(await rig.rows(NODES)) == 2
            assert (await rig.rows("SELECT uses_left FROM enrollment_tokens"))[0].uses_left == 0

    asyncio.run(run())


def test_a_lost_answer_is_given_again_to_the_same_key(migrated_postgres_url: str, tmp_path: Path) -> None:
    async def run() -> None:
        async with node_api(migrated_postgres_url, tmp_path) as rig:
            token = await rig.token()
            node = FakeNode("edge-1", rig.pki.ca_pem, rig.ports)
            first = await node.enrol(token)
            again = await node.enrol(token)
            assert again.node_id == first.node_id
            async with node.session():
                pass
            assert len(await rig.rows(NODES)) == 1
            # The same name with another key is somebody else, and so is the same key without the token's secret.
            for thief, words in ((FakeNode("edge-1", rig.pki.ca_pem, rig.ports), token), (node, token + "x")):
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await thief.enrol(words)
                assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
            await rig.execute("UPDATE nodes SET revoked_at = now()")
            with pytest.raises(grpc.aio.AioRpcError):
                await node.enrol(token)

    asyncio.run(run())


def test_a_peer_that_keeps_failing_must_wait(migrated_postgres_url: str, tmp_path: Path) -> None:
    async def run() -> None:
        async with node_api(migrated_postgres_url, tmp_path) as rig:
            codes = []
            for _ in range(11):
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await FakeNode("edge-1", rig.pki.ca_pem, rig.ports).enrol("garbage")
                codes.append(caught.value.code())
            assert codes == [grpc.StatusCode.UNAUTHENTICATED] * 10 + [grpc.StatusCode.RESOURCE_EXHAUSTED]

    asyncio.run(run())


def test_a_server_of_another_authority_is_not_believed(migrated_postgres_url: str, tmp_path: Path) -> None:
    async def run() -> None:
        async with node_api(migrated_postgres_url, tmp_path) as rig:
            other = Pki.open(tmp_path / "other")
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await FakeNode("edge-1", other.ca_pem, rig.ports).enrol(await rig.token())
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
            assert await rig.rows(NODES) == []

    asyncio.run(run())


def test_renewal_proves_the_old_key(migrated_postgres_url: str, tmp_path: Path) -> None:
    async def run() -> None:
        async with node_api(migrated_postgres_url, tmp_path) as rig:
            node = await rig.enrolled("edge-1")
            first = node.chain
            await node.renew()
            assert node.chain != first
            async with node.session():
                pass

            stranger = await rig.enrolled("edge-2")
            cases = [
                ({"signature": b"junk"}, grpc.StatusCode.UNAUTHENTICATED, "signature"),
                ({"nonce": b"x" * 32}, grpc.StatusCode.UNAUTHENTICATED, "nonce"),
                ({"node_id": stranger.id}, grpc.StatusCode.UNAUTHENTICATED, "nonce"),
                ({"certificate": "junk"}, grpc.StatusCode.INVALID_ARGUMENT, "certificate"),
                ({"certificate": stranger.chain.decode()}, grpc.StatusCode.UNAUTHENTICATED, "signature"),
            ]
            for changes, code, sentence in cases:
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await node.renew(**changes)
                assert refused(caught)[0] is code, changes
                assert sentence in refused(caught)[1]

    asyncio.run(run())


def test_a_revoked_node_is_not_renewed(migrated_postgres_url: str, tmp_path: Path) -> None:
    async def run() -> None:
        async with node_api(migrated_postgres_url, tmp_path) as rig:
            node = await rig.enrolled("edge-1")
            await rig.execute("UPDATE nodes SET revoked_at = now()")
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await node.renew()
            assert refused(caught)[0] is grpc.StatusCode.PERMISSION_DENIED

    asyncio.run(run())
