"""fleetctl against the real REST API on a real database: what the two must agree on."""

from __future__ import annotations

import asyncio
import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import uvicorn

from fleetctl.cli import run
from tests.support import rest
from tests.support.processes import wait_until

pytestmark = pytest.mark.postgres
FLEET = Path(__file__).parents[3] / "deploy/demo/fleet.yaml"


@pytest.fixture
def server(migrated_postgres_url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[rest.Api]:
    """The API on a port, and an environment in which fleetctl finds it."""
    found: list[tuple[rest.Api, uvicorn.Server, str]] = []

    async def serve() -> None:
        async with rest.serving(migrated_postgres_url) as api:
            listener = uvicorn.Server(uvicorn.Config(api.app, port=0, log_level="warning", lifespan="off"))
            found.append((api, listener, api.client.headers["authorization"].removeprefix("Bearer ")))
            await listener.serve()

    thread = threading.Thread(target=lambda: asyncio.run(serve()), name="rest")
    thread.start()
    wait_until(lambda: found and found[0][1].started, "the API listens")
    api, listener, key = found[0]
    port = listener.servers[0].sockets[0].getsockname()[1]
    monkeypatch.setenv("FLEETCTL_SERVER", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("FLEETCTL_TOKEN", key)
    monkeypatch.setenv("FLEETCTL_CONFIG", str(tmp_path / "none.toml"))
    yield api
    listener.should_exit = True
    thread.join(20)


Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def fleetctl(server: rest.Api, capsys: pytest.CaptureFixture[str]) -> Call:
    """Run a command line: exit code, standard output, standard error."""

    def call(*arguments: str) -> tuple[int, str, str]:
        code = run(list(arguments))
        return code, *capsys.readouterr()

    return call


def test_the_fleet_of_the_demo_is_applied_shown_and_deleted(fleetctl: Call) -> None:
    code, out, err = fleetctl("apply", "-f", str(FLEET))
    assert (code, out) == (2, "")
    assert 'selector "tier=demo" matches no node now (no node has enrolled yet): correct it, or' in " ".join(
        err.split()
    )
    early = ("apply", "--allow-unmatched", "-f", str(FLEET))
    assert fleetctl(*early, "--dry-run")[1].splitlines() == [
        "model/smollm2-135m created (dry run)",
        "agent/geographer created (dry run)",
        "deployment/geographer created (dry run)",
    ]
    assert fleetctl("get", "models")[2] == "No models yet.\n"
    assert fleetctl(*early)[0] == 0
    assert "model/smollm2-135m unchanged" in fleetctl("apply", "-f", str(FLEET))[1]

    assert fleetctl("get", "agents")[1].splitlines()[1].split()[:4] == ["geographer", "1", "smollm2-135m", "device"]
    assert "agent/geographer" in fleetctl("get", "deployments")[1]
    assert json.loads(fleetctl("get", "deploy", "geographer", "-o", "json")[1])["spec"]["replicas"] == 2
    code, page, _ = fleetctl("describe", "deployment", "geographer")
    assert code == 0
    assert "Selector:" in page
    assert "tier=demo" in page
    assert "You answer questions about geography" in fleetctl("describe", "agent", "geographer")[1]
    assert "Variant q4-1 (gguf, Q4_1)" in fleetctl("describe", "model", "smollm2-135m")[1]
    assert fleetctl("explain", "geographer")[0] == 0

    code, out, _ = fleetctl("delete", "-f", str(FLEET))
    assert (code, out.splitlines()) == (
        0,
        ["deployment/geographer deleted", "agent/geographer deleted", "model/smollm2-135m deleted"],
    )
    assert fleetctl("get", "deployments")[2] == "No deployments yet.\n"


def test_what_the_server_finds_wrong_is_told_with_its_line(fleetctl: Call, tmp_path: Path) -> None:
    file = tmp_path / "fleet.yaml"
    file.write_text(
        FLEET.read_text().replace("  instructions:", "  instuctions:").replace("replicas: 2", "replicas: many")
    )
    lines = file.read_text().splitlines()
    code, out, err = fleetctl("apply", "-f", str(file))
    assert (code, out) == (2, "")
    number = next(index for index, line in enumerate(lines, 1) if "instuctions" in line)
    assert f"{file}:{number}:3:" in err
    assert "instructions" in err, "the nearest known name is told"
    number = next(index for index, line in enumerate(lines, 1) if "replicas: many" in line)
    assert f"{file}:{number}:3:" in err
    assert fleetctl("get", "models")[2] == "No models yet.\n", "nothing of it was applied"


def test_a_model_file_on_this_machine_reaches_the_server(fleetctl: Call, server: rest.Api, tmp_path: Path) -> None:
    (tmp_path / "tiny.gguf").write_bytes(b"GGUF and so on")
    model = {
        "apiVersion": "slmfleet/v1",
        "kind": "Model",
        "metadata": {"name": "tiny"},
        "spec": {
            "version": "1",
            "variants": [{"name": "q", "format": "gguf", "files": [{"source": "file:tiny.gguf"}]}],
        },
    }
    (tmp_path / "model.json").write_text(json.dumps(model))
    assert fleetctl("apply", "-f", str(tmp_path / "model.json"))[1] == "model/tiny created\n"
    digest = hashlib.sha256(b"GGUF and so on").hexdigest()
    assert server.blobs.path(digest).read_bytes() == b"GGUF and so on"
    assert digest in fleetctl("get", "model", "tiny", "-o", "yaml")[1]


def test_tokens_are_made_listed_and_revoked(fleetctl: Call) -> None:
    code, token, hint = fleetctl("token", "create", "--ttl", "30m", "--uses", "2", "--label", "site=lyon")
    assert code == 0
    assert token.startswith("slmfleet1.")
    assert "agentd enroll" in hint
    identity = token.split(".")[1]
    listed = fleetctl("token", "list")[1]
    assert identity in listed
    assert "site=lyon" in listed
    assert token.split(".")[2] not in listed
    assert fleetctl("token", "revoke", identity)[1] == f"token/{identity} revoked\n"
    assert "revoked" in fleetctl("get", "tokens")[1] or fleetctl("get", "tokens")[2] == "No tokens yet.\n"


def test_a_selector_with_a_mistake_is_the_callers_fault(fleetctl: Call) -> None:
    code, out, err = fleetctl("get", "nodes", "-l", "site in (")
    assert (code, out) == (2, "")
    assert err.startswith("error: ")


def test_a_wrong_key_gets_nothing(fleetctl: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLEETCTL_TOKEN", "wrong")
    assert fleetctl("get", "nodes")[0] == 1
    monkeypatch.delenv("FLEETCTL_TOKEN")
    assert fleetctl("get", "nodes")[0] == 1


def test_versions_of_both_sides(fleetctl: Call) -> None:
    code, out, _ = fleetctl("version")
    assert code == 0
    assert len(out.splitlines()) == 2
