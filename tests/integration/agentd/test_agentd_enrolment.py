"""Enrolment and renewal against a real TLS server; the programs as processes."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from agentd.identity import files as identity_files
from agentd.identity.enroll import enroll
from agentd.identity.files import Endpoints, Identity, learn_endpoints, load, save, trust
from agentd.identity.pinning import parse_token
from agentd.identity.renewal import keep_renewed, renew_in_child
from controlplane.node_api.pki import Pki
from slmfleet.errors import UserError
from slmfleet.v1 import state_pb2
from tests.support.fake_controlplane import FakeControlPlane

INVENTORY = state_pb2.Inventory(hostname="h", formats=["gguf"])


async def agentd(*arguments: str | Path) -> tuple[int, str]:
    """Run the program; (exit code, what it said on standard error)."""
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "agentd", *map(str, arguments),
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    async with asyncio.timeout(60):
        _, said = await child.communicate()
    assert child.returncode is not None
    return child.returncode, said.decode()


def test_enrolment_makes_a_private_key_here_and_an_identity(tmp_path: Path) -> None:
    async def test() -> None:
        async with FakeControlPlane(tmp_path) as plane:
            identity = await plane.enrol(tmp_path / "state")
            assert (identity.node_id, identity.name) == ("id-n1", "n1")
            assert load(tmp_path / "state") == identity
            assert identity.key_file.stat().st_mode & 0o777 == 0o600
            assert identity.folder.stat().st_mode & 0o777 == 0o700
            assert identity.endpoints.node_api == plane.endpoints.node_api
            assert identity.not_after_s - identity.not_before_s > 86400
            (request,) = plane.enrolled
            assert (request.name, dict(request.labels)) == ("n1", {"site": "lyon"})
            assert request.inventory.hostname == "h"
            assert b"PRIVATE" not in request.SerializeToString()
            identity.ssl_context()

    asyncio.run(test())


def test_a_server_of_another_authority_never_sees_the_token(tmp_path: Path) -> None:
    async def test() -> None:
        async with FakeControlPlane(tmp_path / "a") as good, FakeControlPlane(tmp_path / "b") as evil:
            token = parse_token(good.new_token())
            with pytest.raises(UserError, match="not the one that made this token"):
                await asyncio.to_thread(
                    enroll, tmp_path / "state", evil.endpoints.enrollment, token, "n1", {}, INVENTORY
                )
            assert evil.enrolled == []
            assert load(tmp_path / "state") is None

    asyncio.run(test())


def test_the_command_line_enrols_once_and_says_why_not(tmp_path: Path) -> None:
    async def test() -> None:
        async with FakeControlPlane(tmp_path) as plane:
            file = tmp_path / "token"
            file.write_text(plane.new_token() + "\n")
            call = ("enroll", "--state-dir", tmp_path / "s", "--server", plane.endpoints.enrollment,
                    "--token-file", file, "--name", "n1")  # fmt: skip
            assert await agentd(*call) == (0, "")
            code, said = await agentd(*call)
            assert (code, said.count("\n")) == (1, 1)
            assert "enrolled already" in said
            other = ("enroll", "--state-dir", tmp_path / "t", *call[3:])
            code, said = await agentd(*other)
            assert (code, said.count("\n")) == (1, 1)
            assert "token has been used" in said
            secret = file.read_text().split(".")[2]
            assert secret not in said
            assert load(tmp_path / "t") is None

    asyncio.run(test())


def test_a_server_that_is_not_there_is_temporary(tmp_path: Path) -> None:
    async def test() -> None:
        async with FakeControlPlane(tmp_path) as plane:
            address, token = plane.endpoints.enrollment, plane.new_token()
        code, said = await agentd(
            "enroll", "--state-dir", tmp_path / "s", "--server", address, "--token", token, "--name", "n1"
        )
        assert code == 75
        assert "cannot reach the control plane" in said

    asyncio.run(test())


def test_a_lost_answer_is_asked_for_again_with_the_same_key(tmp_path: Path) -> None:
    async def test() -> None:
        async with FakeControlPlane(tmp_path) as plane:
            first = await plane.enrol(tmp_path / "state")
            key = first.key_file.read_bytes()
            (first.folder / "node.json").unlink()  # as if power went before the last file was written
            again = await plane.enrol(tmp_path / "state")
            assert again.key_file.read_bytes() == key

    asyncio.run(test())


def test_renewal_replaces_the_certificate_and_keeps_the_key(tmp_path: Path) -> None:
    async def test() -> None:
        async with FakeControlPlane(tmp_path) as plane:
            plane.certificate_days = 1
            old = await plane.enrol(tmp_path / "state")
            certificate, key = old.certificate_file.read_bytes(), old.key_file.read_bytes()
            plane.certificate_days = 30
            assert await renew_in_child(tmp_path / "state") == ""
            new = load(tmp_path / "state")
            assert new is not None
            assert new.not_after_s > old.not_after_s + 86400
            assert new.certificate_file.read_bytes() != certificate
            assert new.key_file.read_bytes() == key
            new.ssl_context()

    asyncio.run(test())


def test_a_certificate_that_is_due_is_renewed_at_once_and_again_after_failures(tmp_path: Path) -> None:
    async def test() -> None:
        async with FakeControlPlane(tmp_path) as plane:
            identity = await plane.enrol(tmp_path / "state")
            save(replace(identity, not_before_s=0.0, not_after_s=time.time() + 60))
            renewed: asyncio.Queue[Identity] = asyncio.Queue()
            async with asyncio.timeout(30), asyncio.TaskGroup() as tasks:
                keeper = tasks.create_task(keep_renewed(tmp_path / "state", time.time, renewed.put_nowait))
                fresh = await renewed.get()
                keeper.cancel()
            assert fresh.not_after_s > time.time() + 86400

    asyncio.run(test())


def test_renewal_says_why_it_failed(tmp_path: Path) -> None:
    async def test() -> None:
        async with FakeControlPlane(tmp_path) as plane:
            await plane.enrol(tmp_path / "state")
            plane.take_nonce = lambda nonce: False  # type: ignore[method-assign]
            assert "unknown nonce" in await renew_in_child(tmp_path / "state")

    asyncio.run(test())


def test_endpoints_are_learned_and_kept(tmp_path: Path) -> None:
    async def test() -> None:
        async with FakeControlPlane(tmp_path) as plane:
            identity = await plane.enrol(tmp_path / "state")
            changed = learn_endpoints(identity, Endpoints("new:1", "", ""))
            assert changed.endpoints == replace(identity.endpoints, node_api="new:1")
            assert load(tmp_path / "state") == changed

    asyncio.run(test())


def test_authorities_change_only_by_way_of_a_set_that_overlaps(tmp_path: Path) -> None:
    async def test() -> None:
        async with FakeControlPlane(tmp_path) as plane:
            identity = await plane.enrol(tmp_path / "state")
            old, new = plane.pki.ca_pem.decode(), Pki.open(tmp_path / "other").ca_pem.decode()
            assert trust(identity, []) == ""
            assert "none of them is trusted now" in trust(identity, [new])
            assert "no certificates" in trust(identity, ["nonsense"])
            assert identity_files.fingerprints(identity.ca_file.read_text()) == identity_files.fingerprints(old)
            assert trust(identity, [old, new]) == ""
            assert trust(identity, [new]) == ""
            assert identity_files.fingerprints(identity.ca_file.read_text()) == identity_files.fingerprints(new)

    asyncio.run(test())


def test_a_damaged_identity_is_one_sentence(tmp_path: Path) -> None:
    folder = tmp_path / "identity"
    folder.mkdir()
    (folder / "node.json").write_text(json.dumps({"node_id": "x"}))
    with pytest.raises(UserError, match="damaged"):
        load(tmp_path)
