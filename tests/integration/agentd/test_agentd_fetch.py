"""Downloads over real mutual TLS: resume, verification, and every way in which they go wrong."""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from agentd.artifacts.attempt import Cancelled, FetchFailed, Stop
from agentd.artifacts.fetch import fetch
from agentd.artifacts.marks import Marks
from agentd.artifacts.store import ArtifactStore
from agentd.identity import keys
from agentd.identity.files import Endpoints, Identity
from agentd.store.database import Database
from controlplane.node_api.pki import Pki
from tests.support.fake_controlplane import FileServer

CONTENT = os.urandom(900_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    return Pki.open(tmp_path_factory.mktemp("plane") / "pki")


def node_identity(pki: Pki, folder: Path) -> Identity:
    """An identity as enrolment leaves it."""
    folder.mkdir(exist_ok=True)
    key = keys.load_or_make(folder / "client.key")
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    signed = pki.sign_node_csr(keys.signing_request(key, "n1"), "id-n1")
    (folder / "client.pem").write_text(signed.chain_pem)
    (folder / "ca.pem").write_bytes(pki.ca_pem)
    return Identity(folder, "id-n1", "n1", Endpoints("", "", ""), 0.0, 0.0)


@pytest.fixture
def server(pki: Pki) -> Iterator[FileServer]:
    files = FileServer(pki, {SHA256: CONTENT})
    files.start()
    yield files
    files.stop()


@pytest.fixture
def context(pki: Pki, tmp_path: Path) -> ssl.SSLContext:
    return node_identity(pki, tmp_path / "identity").ssl_context()


class Downloads:
    """Calls fetch with what does not vary."""

    def __init__(self, server: FileServer, context: ssl.SSLContext, folder: Path) -> None:
        self.url = f"https://127.0.0.1:{server.port}"
        self.context = context
        self.partial = folder / SHA256
        self.stop = Stop()

    def get(self, size: int = len(CONTENT), sha256: str = SHA256) -> int:
        """Where the download was resumed from."""
        return fetch(self.url, sha256, size, self.partial, self.context, self.stop).resumed_from

    def fails(self, reason: str, size: int = len(CONTENT), sha256: str = SHA256) -> str:
        with pytest.raises(FetchFailed) as caught:
            self.get(size, sha256)
        assert caught.value.reason == reason
        return str(caught.value)


@pytest.fixture
def downloads(server: FileServer, context: ssl.SSLContext, tmp_path: Path) -> Downloads:
    return Downloads(server, context, tmp_path)


def test_a_file_is_fetched_whole(downloads: Downloads) -> None:
    assert downloads.get() == 0
    assert downloads.partial.read_bytes() == CONTENT


def test_a_cut_download_is_resumed_where_it_stopped(downloads: Downloads, server: FileServer) -> None:
    server.cut_after = [300_000]
    downloads.fails("FetchFailed")
    have = downloads.partial.stat().st_size
    assert 0 < have <= 300_000
    assert downloads.get() == have
    assert downloads.partial.read_bytes() == CONTENT
    assert server.requests == [(SHA256, None), (SHA256, f"bytes={have}-")]


def test_a_complete_partial_file_needs_no_network(downloads: Downloads, server: FileServer) -> None:
    downloads.partial.write_bytes(CONTENT)
    assert downloads.get() == len(CONTENT)
    assert server.requests == []


def test_a_server_that_ignores_ranges_is_read_from_the_start(downloads: Downloads, server: FileServer) -> None:
    downloads.partial.write_bytes(CONTENT[:1000])
    server.ignore_range = True
    assert downloads.get() == 0
    assert downloads.partial.read_bytes() == CONTENT


def test_wrong_bytes_are_deleted(downloads: Downloads, server: FileServer) -> None:
    server.forged[SHA256] = CONTENT[:-1] + b"?"
    downloads.fails("DigestMismatch")
    assert not downloads.partial.exists()


def test_a_damaged_partial_file_heals(downloads: Downloads) -> None:
    downloads.partial.write_bytes(b"?" * 1000)
    downloads.fails("DigestMismatch")
    assert downloads.get() == 0


def test_endless_data_ends_at_the_announced_size(downloads: Downloads, server: FileServer) -> None:
    server.forged[SHA256] = CONTENT + b"more"
    downloads.fails("DigestMismatch")
    assert not downloads.partial.exists() or downloads.partial.stat().st_size == 0


def test_a_partial_file_longer_than_the_file_starts_anew(downloads: Downloads) -> None:
    downloads.partial.write_bytes(CONTENT + b"x")
    assert downloads.get() == 0


def test_a_file_that_is_not_there_is_told(downloads: Downloads) -> None:
    assert "(yet)" in downloads.fails("NotFound", sha256="0" * 64)


def test_an_unreachable_server_is_told(downloads: Downloads, server: FileServer) -> None:
    server.stop()
    downloads.fails("FetchFailed")


def test_a_server_of_another_authority_gets_nothing(pki: Pki, tmp_path: Path, context: ssl.SSLContext) -> None:
    other = FileServer(Pki.open(tmp_path / "other"), {SHA256: CONTENT})
    other.start()
    try:
        said = Downloads(other, context, tmp_path).fails("FetchFailed")
        assert "certificate" in said.lower()
        assert other.requests == []
    finally:
        other.stop()


def test_a_download_can_be_stopped_while_it_waits(downloads: Downloads, server: FileServer) -> None:
    server.may_go_on.clear()
    raised: list[BaseException] = []

    def work() -> None:
        try:
            downloads.get()
        except BaseException as error:  # noqa: BLE001  # handed to the test
            raised.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    while not downloads.partial.exists() or downloads.partial.stat().st_size == 0:
        assert thread.is_alive()
    downloads.stop.set()
    thread.join(5)
    assert not thread.is_alive()
    assert isinstance(raised[0], Cancelled)
    assert downloads.partial.stat().st_size > 0


@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs unshare(1) for a small file system")
def test_a_full_disk_is_told_and_leaves_nothing(downloads: Downloads, pki: Pki, tmp_path: Path) -> None:
    """On a real tmpfs of 512 KiB, in a mount namespace of its own."""
    small = tmp_path / "small"
    small.mkdir()
    identity = tmp_path / "identity"
    program = f"""
import sys
from pathlib import Path
from agentd.artifacts.attempt import FetchFailed, Stop
from agentd.artifacts.fetch import fetch
from agentd.identity.files import Endpoints, Identity
context = Identity(Path({str(identity)!r}), "", "", Endpoints("", "", ""), 0, 0).ssl_context()
try:
    fetch({downloads.url!r}, {SHA256!r}, {len(CONTENT)}, Path({str(small / "partial")!r}), context, Stop())
except FetchFailed as error:
    print(error.reason, list(Path({str(small)!r}).iterdir()))
"""
    command = ["unshare", "-rm", "sh", "-c", 'mount -t tmpfs -o size=512k none "$1" && exec "$2" -c "$3"', "sh",
               str(small), sys.executable, program]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    if "unshare failed" in done.stderr or "mount:" in done.stderr:
        pytest.skip(f"no mount namespace here: {done.stderr.strip()}")
    assert done.stdout.strip() == "DiskFull []", done.stderr


# --- the store around it ----------------------------------------------------------------------------------------------


def test_blobs_are_shared_linked_and_protected(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path / "artifacts")
    store.partial_path(SHA256).write_bytes(CONTENT)
    store.adopt(SHA256)
    one = store.link_view("d" * 64, "q4", [("model.gguf", SHA256), ("deep/er.bin", SHA256)])
    two = store.link_view("e" * 64, "q4", [("model.gguf", SHA256)])
    assert (one / "deep/er.bin").samefile(two / "model.gguf")
    assert store.blob_path(SHA256).stat().st_mode & 0o777 == 0o400
    (one / "stray").write_text("x")
    store.link_view("d" * 64, "q4", [("model.gguf", SHA256)])
    assert sorted(path.name for path in one.rglob("*") if path.is_file()) == ["model.gguf"]
    assert store.views() == {("d" * 64, "q4"), ("e" * 64, "q4")}
    store.remove_view("d" * 64, "q4")
    assert store.views() == {("e" * 64, "q4")}
    assert [blob.sha256 for blob in store.blobs()] == [SHA256]


def test_a_damaged_blob_is_found_and_deleted(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path / "artifacts")
    store.blob_path(SHA256).write_bytes(CONTENT[:-1])
    assert store.verify(SHA256, Stop()) is None
    assert store.blobs() == []


def test_marks_hold_only_while_the_file_is_the_same(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path / "artifacts")
    store.partial_path(SHA256).write_bytes(CONTENT)

    async def test() -> None:
        database = await Database.open(tmp_path / "store.db")
        marks = Marks(database)
        await marks.remember(store.adopt(SHA256), 100.0)
        await marks.touch([SHA256], 200.0)
        assert (await marks.load())[SHA256] == (store.blobs()[0], 200)
        os.utime(store.blob_path(SHA256))
        assert (await marks.load())[SHA256][0] != store.blobs()[0]
        await marks.forget(SHA256)
        assert await marks.load() == {}
        await database.close()

    asyncio.run(test())
