"""``-o json`` and ``-o yaml`` of the commands that change or ask something: shapes that scripts may lean on."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import yaml

from fleetctl import session
from fleetctl.cli import app, run
from fleetctl.errors import Problem
from slmfleet import __version__

NODE = {"kind": "Node", "metadata": {"name": "edge-1", "labels": {"site": "lyon"}}, "status": {"state": "online"}}
MANIFESTS = "kind: Agent\nmetadata: {name: greeter}\n---\nkind: Deployment\nmetadata: {name: greeter}\n"
APPLIED = [{"kind": "Agent", "name": "greeter", "action": "created", "warnings": ["no node matches"]}]
STREAM = [
    {"choices": [{"delta": {"content": "Paris."}, "finish_reason": "stop"}]},
    {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 2}, "slmfleet": {"tokens_per_second": 40.0}},
]


class Exchange:
    """A client without a server: gives what is known by method and path, says 404 to the rest."""

    server = "http://fleet"

    def __init__(self, answers: Mapping[str, Any]) -> None:
        self._answers = answers

    def __enter__(self) -> Exchange:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing to close."""

    def call(self, method: str, path: str, *, params: object = None, body: object = None) -> Any:
        if f"{method} {path}" not in self._answers:
            raise Problem(404, f"there is no {path}")
        return self._answers[f"{method} {path}"]

    def get(self, path: str, **_: object) -> Any:
        return self.call("GET", path)

    def items(self, path: str, limit: int | None = None, **_: object) -> Iterator[Any]:
        yield from self.call("GET", path)["items"]

    def apply(self, *_: object, **__: object) -> list[dict[str, Any]]:
        return APPLIED

    @contextlib.contextmanager
    def chat(self, body: object, timeout_s: float) -> Iterator[Any]:
        class Response:
            headers = {"x-slmfleet-node": "edge-2", "x-slmfleet-replica": "r1"}  # noqa: RUF012

            def iter_lines(self) -> list[str]:
                return [*(f"data: {json.dumps(chunk)}" for chunk in STREAM), "data: [DONE]"]

        yield Response()


Call = Callable[..., tuple[int, Any]]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Run a command with ``-o json`` and ``-o yaml``, which must agree; exit code and value."""
    answers = {
        "PATCH /nodes/edge-1": NODE,
        "GET /nodes/edge-1": NODE,
        "GET /nodes/edge-1/events": {"items": [{"message": "came online"}]},
        "GET /info": {"version": "0.1.0"},
        "DELETE /deployments/greeter": {},
        "DELETE /enrollment-tokens/t1": {},
    }
    monkeypatch.setattr(session.Session, "client", lambda _: Exchange(answers))

    def run_both(*arguments: str) -> tuple[int, Any]:
        code = run([*arguments, "-o", "json"])
        value = json.loads(capsys.readouterr().out)
        assert run([*arguments, "-o", "yaml"]) == code
        again = yaml.safe_load(capsys.readouterr().out)
        for volatile in ("firstTokenSeconds", "totalSeconds"):
            if volatile in value:
                assert value.pop(volatile) >= 0
                again.pop(volatile)
        assert again == value
        return code, value

    return run_both


@pytest.fixture
def manifests(tmp_path: Any) -> str:
    (tmp_path / "a.yaml").write_text(MANIFESTS)
    return str(tmp_path / "a.yaml")


def test_apply_tells_the_servers_results(call: Call, manifests: str) -> None:
    assert call("apply", "-f", manifests) == (0, {"dryRun": False, "results": APPLIED})
    assert call("apply", "-f", manifests, "--dry-run")[1]["dryRun"] is True


def test_delete_tells_of_each_what_became_of_it(call: Call, manifests: str) -> None:
    assert call("delete", "-f", manifests, "--ignore-not-found") == (
        0,
        {
            "results": [
                {"kind": "Deployment", "name": "greeter", "action": "deleted"},
                {"kind": "Agent", "name": "greeter", "action": "absent"},
            ]
        },
    )


def test_what_is_deleted_already_is_told_when_the_next_one_fails(call: Call, manifests: str) -> None:
    code, value = call("delete", "-f", manifests)
    assert code == 1
    assert value == {"results": [{"kind": "Deployment", "name": "greeter", "action": "deleted"}]}


def test_revoked_tokens_have_the_same_shape(call: Call) -> None:
    revoked = {"results": [{"kind": "Token", "name": "t1", "action": "revoked"}]}
    assert call("token", "revoke", "t1") == call("delete", "token", "t1") == (0, revoked)


@pytest.mark.parametrize("command", [["label", "edge-1", "site=lyon"], ["drain", "edge-1"], ["undrain", "edge-1"]])
def test_a_changed_node_is_shown_as_get_shows_it(call: Call, command: list[str]) -> None:
    assert call(*command) == call("get", "node", "edge-1") == (0, NODE)


def test_describe_gives_all_that_belongs_to_an_object(call: Call) -> None:
    code, value = call("describe", "node", "edge-1")
    assert code == 0
    assert value == {
        "object": NODE, "replicas": [], "versions": [], "events": [{"message": "came online"}], "nodes": [],
        "missing": [],
    }  # fmt: skip


def test_ask_gives_the_whole_answer_with_its_figures(call: Call) -> None:
    assert call("ask", "greeter", "capital of France?") == (
        0,
        {
            "answer": "Paris.", "node": "edge-2", "replica": "r1", "model": "", "finishReason": "stop",
            "promptTokens": 5, "outputTokens": 2, "tokensPerSecond": 40.0,
        },
    )  # fmt: skip


def test_versions(call: Call) -> None:
    assert call("version") == (
        0,
        {"fleetctl": __version__, "controlplane": {"version": "0.1.0", "server": "http://fleet"}},
    )
    assert call("version", "--client") == (0, {"fleetctl": __version__, "controlplane": None})


COMMANDS = ["apply", "delete", "label", "drain", "undrain", "ask", "version", "describe", "get", "explain"]


@pytest.mark.parametrize("command", [*([name] for name in COMMANDS), ["token", "create"], ["token", "revoke"]])
def test_help_states_the_shape(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*command, "--help"]) == 0
    said = capsys.readouterr().out
    assert "--output" in said
    assert re.search(r"-o json: (\{|the node|one object)", " ".join(said.split()))
    assert "}: }" not in said, "rich took a list for markup"


def test_every_command_has_an_output() -> None:
    assert {item.callback.__name__.removesuffix("_command") for item in app.registered_commands if item.callback} == {
        *COMMANDS
    }
