"""Whole command lines against a small HTTP server that speaks the REST contract: what is sent, said and returned."""

import hashlib
import http.server
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from fleetctl.cli import run
from fleetctl.kinds import find
from fleetctl.session import global_flags_first
from fleetctl.writing import parse_changes
from slmfleet.errors import UsageError


@dataclass
class Server:
    """Answers by method and path; keeps what was asked."""

    url: str = ""
    answers: dict[str, tuple[int, Any]] = field(default_factory=dict)
    asked: list[tuple[str, str, Any]] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Server]:
    known = Server()

    class Handler(http.server.BaseHTTPRequestHandler):
        def handle_any(self) -> None:
            content = self.rfile.read(int(self.headers.get("content-length") or 0))
            try:
                body = json.loads(content) if content else None
            except ValueError:
                body = content
            known.asked.append((self.command, self.path, body))
            known.keys.append(self.headers.get("authorization", ""))
            absent = (404, {"title": "Not Found", "detail": f"there is no {self.path}"})
            status, answer = known.answers.get(f"{self.command} {self.path.partition('?')[0]}", absent)
            data = answer.encode() if isinstance(answer, str) else json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("x-slmfleet-node", "edge-2")
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_PATCH = do_DELETE = do_PUT = handle_any

        def log_message(self, format: str, *args: object) -> None:
            """Quiet."""

    listener = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    known.url = f"http://127.0.0.1:{listener.server_port}"
    threading.Thread(target=listener.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    monkeypatch.setenv("FLEETCTL_SERVER", known.url)
    monkeypatch.setenv("FLEETCTL_TOKEN", "key")
    monkeypatch.setenv("FLEETCTL_CONFIG", str(tmp_path / "none.toml"))
    yield known
    listener.shutdown()
    listener.server_close()


Said = Callable[[], tuple[str, str]]


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Said:
    def read() -> tuple[str, str]:
        out, err = capsys.readouterr()
        return out, err

    return read


MANIFEST = """\
kind: Agent
metadata: {name: greeter}
spec:
  instructons: hi
"""


def test_apply_sends_all_documents_and_says_what_became_of_each(server: Server, tmp_path: Path, said: Said) -> None:
    (tmp_path / "a.yaml").write_text(MANIFEST + "---\nkind: Group\nmetadata: {name: shops}\n")
    results = [
        {"kind": "Agent", "name": "greeter", "action": "created", "warnings": []},
        {"kind": "Group", "name": "shops", "action": "unchanged", "warnings": ["no node matches"]},
    ]
    server.answers["POST /api/v1/apply"] = (200, {"results": results})
    assert run(["apply", "-f", str(tmp_path / "a.yaml"), "--dry-run"]) == 0
    [(_, path, body)] = server.asked
    assert path == "/api/v1/apply?dryRun=true"
    assert [document["kind"] for document in body["documents"]] == ["Agent", "Group"]
    assert server.keys == ["Bearer key"]
    out, err = said()
    assert out.splitlines() == ["agent/greeter created (dry run)", "group/shops unchanged (dry run)"]
    assert "no node matches" in err


def test_a_fault_is_told_with_file_line_and_column(server: Server, tmp_path: Path, said: Said) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(MANIFEST)
    errors = [{"pointer": "/documents/0/spec/instructons", "message": "unknown field; did you mean instructions?"}]
    server.answers["POST /api/v1/apply"] = (422, {"title": "Invalid", "detail": "1 error", "errors": errors})
    assert run(["apply", "-f", str(file)]) == 2
    out, err = said()
    assert not out
    assert err == f"error: {file}:4:3: unknown field; did you mean instructions?\n"


def test_a_local_model_file_is_uploaded_and_named_by_digest(server: Server, tmp_path: Path) -> None:
    (tmp_path / "w.gguf").write_bytes(b"GGUF")
    files = [{"source": "file:w.gguf"}, {"source": "file:/nowhere/else.gguf"}]
    model = {"kind": "Model", "metadata": {"name": "m"}, "spec": {"variants": [{"name": "q", "files": files}]}}
    (tmp_path / "m.json").write_text(json.dumps(model))
    digest = hashlib.sha256(b"GGUF").hexdigest()
    server.answers[f"PUT /api/v1/uploads/{digest}"] = (200, {})
    server.answers["POST /api/v1/apply"] = (200, {"results": []})
    assert run(["apply", "-f", str(tmp_path)]) == 0
    (put, path, content), (_, _, applied) = server.asked
    assert (put, path, content) == ("PUT", f"/api/v1/uploads/{digest}", b"GGUF")
    sent = applied["documents"][0]["spec"]["variants"][0]["files"]
    assert [file.get("sha256") for file in sent] == [digest, None]


ZEROS = "0" * 64


@pytest.mark.parametrize(
    ("written", "sentence"),
    [
        (ZEROS, "sha256 is no text (YAML reads bare digits as a number): quote it"),
        ("1" * 64, "quote it"),
        ("", "sha256 is empty: write 64 hex digits, or remove the line"),
        ("''", "'' is no SHA-256: write 64 hex digits, and quote it"),
        ("'b179'", "'b179' is no SHA-256: write 64 hex digits, and quote it"),
    ],
    ids=["zeros", "ones", "empty", "empty text", "short"],
)
@pytest.mark.parametrize("dry_run", [[], ["--dry-run"]], ids=["real", "dry"])
def test_a_digest_that_is_none_is_no_digest_left_out(
    server: Server, tmp_path: Path, said: Said, written: str, sentence: str, dry_run: list[str]
) -> None:
    (tmp_path / "w.gguf").write_bytes(b"GGUF")
    file = tmp_path / "m.yaml"
    file.write_text(
        "kind: Model\nmetadata: {name: m}\nspec:\n  variants:\n    - name: q\n      files:\n"
        f"        - source: file:w.gguf\n          sha256: {written}\n"
    )
    assert run(["apply", "-f", str(file), *dry_run]) == 2
    out, err = said()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith(f"error: {file}:8:11: ")
    assert sentence in err
    assert server.asked == [], "nothing was sent"


def test_a_model_file_with_another_digest_is_not_sent(server: Server, tmp_path: Path, said: Said) -> None:
    (tmp_path / "w.gguf").write_bytes(b"GGUF")
    files = [{"source": "file:w.gguf", "sha256": ZEROS}]
    model = {"kind": "Model", "metadata": {"name": "m"}, "spec": {"variants": [{"name": "q", "files": files}]}}
    (tmp_path / "m.json").write_text(json.dumps(model))
    assert run(["apply", "-f", str(tmp_path)]) == 2
    assert f"has the SHA-256 {hashlib.sha256(b'GGUF').hexdigest()}, not {ZEROS}" in said()[1]
    assert server.asked == []


def test_a_digest_in_capitals_is_the_same_digest(server: Server, tmp_path: Path) -> None:
    (tmp_path / "w.gguf").write_bytes(b"GGUF")
    digest = hashlib.sha256(b"GGUF").hexdigest()
    files = [{"source": "file:w.gguf", "sha256": digest.upper()}]
    model = {"kind": "Model", "metadata": {"name": "m"}, "spec": {"variants": [{"name": "q", "files": files}]}}
    (tmp_path / "m.json").write_text(json.dumps(model))
    server.answers[f"PUT /api/v1/uploads/{digest}"] = (200, {})
    server.answers["POST /api/v1/apply"] = (200, {"results": []})
    assert run(["apply", "-f", str(tmp_path)]) == 0


def test_get_follows_the_pages(server: Server, said: Said) -> None:
    node = {"metadata": {"name": "edge-1"}, "status": {"state": "online"}}
    server.answers["GET /api/v1/nodes"] = (200, {"items": [node], "nextCursor": None})
    assert run(["get", "nodes", "-l", "site in (lyon, turin)"]) == 0
    assert "selector=site+in+%28lyon%2C+turin%29" in server.asked[0][1] or "site%20in" in server.asked[0][1]
    heading, line = said()[0].splitlines()
    assert heading.split()[:2] == ["NAME", "STATE"]
    assert line.split()[:2] == ["edge-1", "online"]


def test_get_as_json_and_yaml_is_what_the_server_sent(server: Server, said: Said) -> None:
    group = {"metadata": {"name": "shops"}, "spec": {"selector": "site=lyon"}}
    server.answers["GET /api/v1/groups/shops"] = (200, group)
    assert run(["get", "group", "shops", "-o", "json"]) == 0
    assert json.loads(said()[0]) == group
    assert run(["get", "groups", "shops", "-o", "yaml"]) == 0
    assert said()[0] == "metadata:\n  name: shops\nspec:\n  selector: site=lyon\n"


def test_an_empty_list_says_so_and_leaves_standard_output_empty(server: Server, said: Said) -> None:
    server.answers["GET /api/v1/models"] = (200, {"items": []})
    assert run(["get", "models"]) == 0
    assert said() == ("", "No models yet.\n")


def test_delete_takes_the_last_document_away_first(server: Server, tmp_path: Path, said: Said) -> None:
    (tmp_path / "a.yaml").write_text(MANIFEST + "---\nkind: Deployment\nmetadata: {name: greeter}\n")
    server.answers["DELETE /api/v1/deployments/greeter"] = (204, "")
    assert run(["delete", "-f", str(tmp_path / "a.yaml"), "--ignore-not-found"]) == 0
    assert [path for _, path, _ in server.asked] == ["/api/v1/deployments/greeter", "/api/v1/agents/greeter"]
    assert said()[0] == "deployment/greeter deleted\n"


def test_ask_prints_the_answer_alone_and_the_figures_beside_it(server: Server, said: Said) -> None:
    parts = [{"choices": [{"delta": {"content": word}}]} for word in ("Par", "is.")]
    end = {
        "choices": [{"delta": {}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 5, "completion_tokens": 2},
        "slmfleet": {"tokens_per_second": 40.0},
    }
    stream = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in [*parts, end]) + "data: [DONE]\n\n"
    server.answers["POST /v1/chat/completions"] = (200, stream)
    assert run(["ask", "greeter", "capital", "of", "France?"]) == 0
    body = server.asked[0][2]
    assert (body["model"], body["messages"][0]["content"]) == ("agent/greeter", "capital of France?")
    out, err = said()
    assert out == "Paris.\n"
    assert err.startswith("edge-2 · 2 tokens · 40.0 tokens/s · first after ")


def test_the_gateways_refusal_is_one_sentence(server: Server, said: Said) -> None:
    refusal = {"error": {"message": "no replica of agent/greeter is ready", "code": "no_replica"}}
    server.answers["POST /v1/chat/completions"] = (503, refusal)
    assert run(["ask", "greeter", "hello"]) == 1
    assert said() == ("", "error: no replica of agent/greeter is ready\n")


def test_a_name_that_is_no_agents_is_a_deployments_or_a_models(server: Server, said: Said) -> None:
    refusal = {"error": {"message": "there is no model 'x' in this fleet", "code": "model_not_found"}}
    server.answers["POST /v1/chat/completions"] = (404, refusal)
    assert run(["ask", "smollm2", "hello"]) == 1
    assert [asked[2]["model"] for asked in server.asked] == ["agent/smollm2", "smollm2"]
    assert said() == ("", "error: there is no model 'x' in this fleet\n")


def test_label_and_drain_patch_the_node(server: Server) -> None:
    server.answers["PATCH /api/v1/nodes/edge-1"] = (200, {})
    assert run(["label", "edge-1", "site=lyon", "old-"]) == 0
    assert run(["drain", "edge-1"]) == run(["undrain", "edge-1"]) == 0
    assert [body for _, _, body in server.asked] == [
        {"labels": {"site": "lyon", "old": None}},
        {"drained": True},
        {"drained": False},
    ]


def test_a_new_token_stands_alone_on_standard_output(server: Server, said: Said) -> None:
    server.answers["POST /api/v1/enrollment-tokens"] = (201, {"id": "a", "token": "slmfleet1.a.b.c"})
    server.answers["GET /api/v1/info"] = (200, {"endpoints": {"enrollment": "10.0.0.1:8443"}})
    assert run(["token", "create", "--ttl", "2h", "--uses", "3", "--label", "site=lyon"]) == 0
    assert server.asked[0][2] == {"ttlSeconds": 7200, "uses": 3, "labels": {"site": "lyon"}}
    out, err = said()
    assert out == "slmfleet1.a.b.c\n"
    assert "--server 10.0.0.1:8443" in err
    assert "--token-file FILE" in err
    assert "--token " not in err, "others can read a command line in ps"


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["get", "nodez"], 2, "unknown kind 'nodez' (did you mean node"),
        (["get", "nodes", "-o", "xml"], 2, "xml"),
        (["apply"], 2, "nothing to apply"),
        (["apply", "-f", "/nowhere.yaml"], 2, "/nowhere.yaml: it does not exist"),
        (["delete", "node"], 2, "name the nodes to delete"),
        (["delete"], 2, "say what to delete"),
        (["label", "edge-1", "nonsense"], 2, "write key=value to set, key- to remove"),
        (["token", "create", "--ttl", "soon"], 2, "no duration"),
        (["get", "model", "nothing"], 1, "there is no /api/v1/models/nothing"),
        (["get", "nodes", "--server", "http://127.0.0.1:9"], 3, "cannot reach the control plane at http://127.0.0.1:9"),
        (["get", "nodes", "--server", "ftp://x"], 2, "'ftp://x' is no address"),
    ],
)
def test_what_goes_wrong_is_one_sentence_and_an_exit_code(
    server: Server, said: Said, arguments: list[str], code: int, sentence: str
) -> None:
    assert run(global_flags_first(arguments)) == code
    out, err = said()
    assert not out
    assert sentence in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1


def test_a_wrong_key_is_told_as_such(server: Server, said: Said) -> None:
    server.answers["GET /api/v1/nodes"] = (401, {"title": "Unauthorized"})
    assert run(["get", "nodes"]) == 1
    assert "does not accept this API key" in said()[1]


def test_global_flags_may_stand_anywhere_but_behind_two_dashes() -> None:
    assert global_flags_first(["get", "nodes", "--server", "x", "-o", "json"]) == [
        "--server", "x", "get", "nodes", "-o", "json",
    ]  # fmt: skip
    assert global_flags_first(["ask", "a", "--token=k", "--", "--server"]) == [
        "--token=k",
        "ask",
        "a",
        "--",
        "--server",
    ]


@pytest.mark.parametrize("change", ["a", "-", "=x", ""])
def test_half_a_label_is_refused(change: str) -> None:
    with pytest.raises(UsageError):
        parse_changes([change])


@pytest.mark.parametrize("word", ["node", "Nodes", "no", "deploy", "deployments", "enrollment-tokens"])
def test_kinds_have_several_names(word: str) -> None:
    assert find(word).plural
