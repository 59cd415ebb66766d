"""`controlplane serve` as in production: PostgreSQL and Mosquitto that want passwords, one node, one question."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psutil
import pytest

from fleetctl.client import Client
from fleetctl.manifests import read
from fleetctl.writing import apply_documents
from tests.support.models import make_tiny_gguf
from tests.support.postgres import private_server
from tests.support.processes import Child, free_port, wait_until

pytestmark = [pytest.mark.postgres, pytest.mark.mqtt]

BIN = Path(sys.executable).parent
MANIFESTS = """
apiVersion: slmfleet/v1
kind: Model
metadata: {name: tiny}
spec:
  version: "1"
  contextTokens: 512
  variants: [{name: f16, format: gguf, files: [{source: "file:tiny.gguf", name: model.gguf}]}]
---
apiVersion: slmfleet/v1
kind: Agent
metadata: {name: greeter}
spec: {instructions: Greet., model: {ref: tiny}, options: {temperature: 0, maxOutputTokens: 8}}
---
apiVersion: slmfleet/v1
kind: Deployment
metadata: {name: greeter}
spec: {agent: greeter, selector: "site=lyon", replicas: 1}
"""


def password() -> str:
    """With every character that an URL, an INI file or a shell could stumble over."""
    return secrets.token_hex(4) + "@:/%?#&+ '$"


@contextlib.contextmanager
def broker(folder: Path, users: Mapping[str, str]) -> Iterator[int]:
    """Mosquitto that knows ``users`` and nobody else; its port."""
    program = shutil.which("mosquitto", path=f"{os.environ['PATH']}:/usr/sbin:/usr/local/sbin")
    if program is None:
        pytest.skip("mosquitto is not installed")
    words = folder / "passwords"
    words.touch(0o600)
    for name, word in users.items():
        subprocess.run(["mosquitto_passwd", "-b", words, name, word], check=True, capture_output=True)
    port = free_port()
    (folder / "mosquitto.conf").write_text(
        f"listener {port} 127.0.0.1\nallow_anonymous false\npassword_file {words}\nuser root\n"
    )
    with Child([program, "-c", folder / "mosquitto.conf"]) as child:
        child.wait_for_line("mosquitto version .* running")
        yield port


def ran(program: str, *arguments: str | Path, env: Mapping[str, str] | None = None) -> str:
    """The output of a program that must succeed."""
    with Child([BIN / program, *arguments], env=env) as child:
        assert child.wait_for_exit(60) == 0, child.output
        return child.output


def answer(client: Client, model: str) -> tuple[str, str]:
    """What the fleet says, and which node said it."""
    text = []
    body = {"model": model, "messages": [{"role": "user", "content": "Hello"}], "stream": True}
    with client.chat(body, 60) as response:
        for line in response.iter_lines():
            if line.startswith("data: {"):
                choices = json.loads(line.removeprefix("data: "))["choices"]
                text += [choice["delta"].get("content") or "" for choice in choices]
        return "".join(text), response.headers["x-slmfleet-node"]


def test_a_question_is_answered_through_servers_that_want_passwords(folder: Path) -> None:
    users = {"controlplane": password(), "node": password()}
    with private_server(password()) as database, broker(folder, users) as mqtt_port:
        login = {name: f"{name}:{quote(word, safe='')}" for name, word in users.items()}
        env = {
            "CONTROLPLANE_POSTGRES_URL": f"{database}?sslmode=prefer&application_name=fleet",
            "CONTROLPLANE_MQTT_URL": f"mqtt://{login['controlplane']}@127.0.0.1:{mqtt_port}",
            "CONTROLPLANE_MQTT_NODE_URL": f"mqtt://{login['node']}@127.0.0.1:{mqtt_port}",
        }
        for name in ("http", "enrollment", "node", "artifacts"):
            env[f"CONTROLPLANE_{name.upper()}_LISTEN"] = "127.0.0.1:0"
        assert "the schema is" in ran("controlplane", "migrate", env=env)
        data, state = folder / "server", folder / "edge-1"
        serve: list[str | Path] = [
            BIN / "controlplane",
            "serve",
            "--data-dir",
            data,
            "--advertise",
            "127.0.0.1",
            "--beat",
            "1s",
        ]
        with Child(serve, env=env) as plane:
            runtime = facts(plane, data)
            with Client(f"http://{runtime['http']}", (data / "admin.token").read_text().strip()) as client:
                token = client.call("POST", "/enrollment-tokens", body={"labels": {"site": "lyon"}})["token"]
                (folder / "token").write_text(token)
                given = ["--server", runtime["enrollment"], "--token-file", folder / "token", "--name", "edge-1"]
                ran("agentd", "enroll", "--state-dir", state, *given)
                run: list[str | Path] = [BIN / "agentd", "run", "--state-dir", state, "--api-listen", "127.0.0.1:0"]
                with Child([*run, "--telemetry-interval", "1s"]) as node:
                    question(client, folder)
                    for child in (plane, node):
                        shown = " ".join(" ".join(one.cmdline()) for one in family(child)) + child.output
                        assert not [word for word in (database, *users.values(), *login.values()) if word in shown]
                    assert node.stop() == 0
            assert plane.stop() == 0


def question(client: Client, folder: Path) -> None:
    make_tiny_gguf(folder / "tiny.gguf")
    (folder / "fleet.yaml").write_text(MANIFESTS)
    apply_documents(client, read([str(folder / "fleet.yaml")]))
    replicas = "/deployments/greeter/replicas"
    wait_until(lambda: [item for item in client.items(replicas) if item["ready"]], "the replica is ready", 60)
    key = client.call("POST", "/api-keys", body={"name": "app", "role": "gateway"})["key"]
    with Client(client.server, key) as app:
        text, node = answer(app, "agent/greeter")
    assert text
    assert node == "edge-1"
    # What the node measured came through the broker.
    wait_until(lambda: list(client.items("/nodes/edge-1/metrics")), "telemetry arrives", 20)


def facts(child: Child, data: Path) -> dict[str, Any]:
    path = data / "runtime.json"
    wait_until(lambda: path.exists() or child.process.poll() is not None, "the control plane is up", 60)
    assert child.process.poll() is None, child.output
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def family(child: Child) -> list[psutil.Process]:
    return [psutil.Process(child.pid), *child.descendants()]
