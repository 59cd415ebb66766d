"""The artifact store on a real disk, and its HTTPS server with real certificates and a real Postgres."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import ssl
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import AsyncIterator
from dataclasses import dataclass
from email.message import Message
from pathlib import Path

import pytest
import sqlalchemy as sa

from controlplane.artifacts.server import ArtifactServer
from controlplane.artifacts.store import BlobStore, DigestMismatch
from controlplane.db.engine import make_engine
from slmfleet.errors import UserError
from tests.support.authority import Authority, Identity

CONTENT = bytes(range(256)) * 12_000  # 3 MB: more than one piece
DIGEST = hashlib.sha256(CONTENT).hexdigest()


async def pieces(content: bytes, size: int = 70_000) -> AsyncIterator[bytes]:
    for start in range(0, len(content), size):
        yield content[start : start + size]


def leftovers(store_root: Path) -> list[Path]:
    return list((store_root / "incoming").iterdir())


# --- the store -----------------------------------------------------------------------------------------------------


def test_what_is_written_is_there_by_its_digest(tmp_path: Path) -> None:
    store = BlobStore(tmp_path)
    assert not store.has(DIGEST)
    assert asyncio.run(store.write(DIGEST, pieces(CONTENT))) == len(CONTENT)
    assert store.has(DIGEST)
    assert store.size(DIGEST) == len(CONTENT)
    assert store.path(DIGEST) == tmp_path / DIGEST[:2] / DIGEST
    assert store.path(DIGEST).read_bytes() == CONTENT
    assert store.path(DIGEST).stat().st_mode & 0o777 == 0o444
    assert leftovers(tmp_path) == []
    assert asyncio.run(store.write(DIGEST, pieces(CONTENT))) == len(CONTENT), "writing twice is writing once"


def test_wrong_content_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    store = BlobStore(tmp_path)
    with pytest.raises(DigestMismatch, match=DIGEST):
        asyncio.run(store.write(DIGEST, pieces(CONTENT[:-1])))
    (tmp_path / "file").write_bytes(b"other")
    for link in (True, False):
        with pytest.raises(DigestMismatch):
            asyncio.run(store.adopt(tmp_path / "file", DIGEST, link=link))
    assert not store.has(DIGEST)
    assert leftovers(tmp_path) == []


def test_a_source_that_breaks_off_leaves_nothing(tmp_path: Path) -> None:
    async def broken() -> AsyncIterator[bytes]:
        yield CONTENT[:2_000_000]
        raise ConnectionResetError("the client left")

    with pytest.raises(ConnectionResetError):
        asyncio.run(BlobStore(tmp_path).write(DIGEST, broken()))
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("link", [True, False])
def test_a_local_file_is_adopted(tmp_path: Path, link: bool) -> None:
    store, file = BlobStore(tmp_path / "store"), tmp_path / "file"
    file.write_bytes(CONTENT)
    assert asyncio.run(store.adopt(file, DIGEST, link=link)) == len(CONTENT)
    assert store.path(DIGEST).samefile(file) is link
    assert store.path(DIGEST).read_bytes() == CONTENT
    assert leftovers(tmp_path / "store") == []


FULL_DISK = """
import asyncio, sys
from pathlib import Path
from controlplane.artifacts.store import BlobStore, StoreFull
root, digest, file = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
async def pieces():
    yield file.read_bytes()
for work in (lambda: BlobStore(root).write(digest, pieces()), lambda: BlobStore(root).adopt(file, digest, link=True)):
    try:
        asyncio.run(work())
    except StoreFull as error:
        print(error)
print([str(path) for path in root.rglob("*") if path.is_file()])
"""


def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path: Path) -> None:
    """On a file system of 2 MB, in a mount namespace of its own."""
    (tmp_path / "small").mkdir()
    (tmp_path / "file").write_bytes(CONTENT)
    mount = 'mount -t tmpfs -o size=2m tmpfs "$1" && exec "$2" -c "$3" "$1" "$4" "$5"'
    arguments = [tmp_path / "small", sys.executable, FULL_DISK, DIGEST, tmp_path / "file"]
    child = subprocess.run(
        ["unshare", "--mount", "--map-root-user", "sh", "-c", mount, "sh", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    if "unshare failed" in child.stderr or "mount:" in child.stderr:
        pytest.skip("no mount namespaces here")
    *sentences, left = child.stdout.splitlines()
    assert len(sentences) == 2, child.stderr
    assert all("is full: free some space there" in sentence for sentence in sentences)
    assert left == "[]"


def test_digests_are_checked_as_names(tmp_path: Path) -> None:
    for name in ("", "../../etc/passwd", DIGEST.upper(), DIGEST + "0"):
        with pytest.raises(ValueError, match="no SHA-256"):
            BlobStore(tmp_path).path(name)


def test_a_crash_leaves_nothing_after_the_next_start(tmp_path: Path) -> None:
    store = BlobStore(tmp_path)
    store.prepare()
    (tmp_path / "incoming" / "half").write_bytes(b"half")
    store.prepare()
    assert leftovers(tmp_path) == []


# --- the server ----------------------------------------------------------------------------------------------------


def _lower(headers: Message) -> dict[str, str]:
    return {name.lower(): value for name, value in headers.items()}


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes


@dataclass
class Site:
    """A running server with one artifact, the node ``edge-1`` and the revoked node ``edge-2``."""

    server: ArtifactServer
    authority: Authority

    async def get(self, path: str, identity: Identity | None, method: str = "GET", **headers: str) -> Answer:
        return await asyncio.to_thread(self._get, path, identity, method, headers)

    def _get(self, path: str, identity: Identity | None, method: str, headers: dict[str, str]) -> Answer:
        context = ssl.create_default_context(cafile=str(self.authority.path))
        if identity:
            context.load_cert_chain(identity.certificate, identity.key)
        opener = urllib.request.build_opener(
            urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context)
        )
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        request = urllib.request.Request(f"https://localhost:{self.server.port}{path}", headers=named, method=method)
        try:
            with opener.open(request, timeout=10) as response:
                return Answer(response.status, _lower(response.headers), response.read())
        except urllib.error.HTTPError as error:
            return Answer(error.code, _lower(error.headers), error.read())


@contextlib.asynccontextmanager
async def site(url: str, folder: Path) -> AsyncIterator[Site]:
    engine = make_engine(url)
    async with engine.begin() as connection:
        await connection.execute(
            sa.text("INSERT INTO nodes (id, name, revoked_at) VALUES ('n1', 'edge-1', NULL), ('n2', 'edge-2', now())")
        )
    store = BlobStore(folder / "blobs")
    await store.write(DIGEST, pieces(CONTENT))
    authority = Authority(folder, "fleet")
    own = authority.issue("controlplane")
    server = ArtifactServer(store, engine, "127.0.0.1", 0, own.certificate, own.key, authority.path)
    server.bind()
    try:
        async with asyncio.TaskGroup() as group:
            task = group.create_task(server.run(), name="artifacts")
            try:
                yield Site(server, authority)
            finally:
                task.cancel()
    finally:
        await engine.dispose()


@pytest.mark.postgres
def test_a_node_downloads_whole_and_in_ranges(migrated_postgres_url: str, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with site(migrated_postgres_url, tmp_path) as here:
            node = here.authority.issue("n1")
            whole = await here.get(f"/artifacts/{DIGEST}", node)
            assert (whole.status, whole.body == CONTENT) == (200, True)
            assert whole.headers["etag"] == f'"{DIGEST}"'
            assert whole.headers["accept-ranges"] == "bytes"
            assert whole.headers["content-length"] == str(len(CONTENT))

            head = await here.get(f"/artifacts/{DIGEST}", node, "HEAD")
            assert (head.status, head.body, head.headers["content-length"]) == (200, b"", str(len(CONTENT)))

            part = await here.get(f"/artifacts/{DIGEST}", node, Range="bytes=1000000-2500000")
            assert (part.status, part.body == CONTENT[1_000_000:2_500_001]) == (206, True)
            assert part.headers["content-range"] == f"bytes 1000000-2500000/{len(CONTENT)}"
            rest = await here.get(f"/artifacts/{DIGEST}", node, Range="bytes=2999999-", If_Range=f'"{DIGEST}"')
            assert (rest.status, rest.body) == (206, CONTENT[2_999_999:])
            other = await here.get(f"/artifacts/{DIGEST}", node, Range="bytes=5-9", If_Range='"another"')
            assert (other.status, len(other.body)) == (200, len(CONTENT))
            beyond = await here.get(f"/artifacts/{DIGEST}", node, Range=f"bytes={len(CONTENT)}-")
            assert (beyond.status, beyond.headers["content-range"]) == (416, f"bytes */{len(CONTENT)}")
            known = await here.get(f"/artifacts/{DIGEST}", node, If_None_Match=f'"{DIGEST}"')
            assert known.status == 304

            assert (await here.get(f"/artifacts/{'0' * 64}", node)).status == 404
            assert (await here.get("/artifacts/../ca.key", node)).status == 404
            post = await here.get(f"/artifacts/{DIGEST}", node, "DELETE")
            assert (post.status, post.headers["allow"]) == (405, "GET, HEAD")

    asyncio.run(asyncio.wait_for(scenario(), 60))


@pytest.mark.postgres
def test_only_enrolled_nodes_of_this_fleet_are_served(migrated_postgres_url: str, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with site(migrated_postgres_url, tmp_path) as here:
            for name in ("n2", "unknown"):
                refused = await here.get(f"/artifacts/{DIGEST}", here.authority.issue(name))
                assert (refused.status, refused.headers["content-type"]) == (403, "application/problem+json")
                assert CONTENT[:100] not in refused.body
            # No certificate, and one of another authority with the same name: TLS itself refuses.
            for identity in (None, Authority(tmp_path, "stranger").issue("n1")):
                with pytest.raises((ssl.SSLError, ConnectionError, urllib.error.URLError)):
                    await here.get(f"/artifacts/{DIGEST}", identity)

    asyncio.run(asyncio.wait_for(scenario(), 60))


@pytest.mark.postgres
def test_a_taken_port_is_one_sentence(migrated_postgres_url: str, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with site(migrated_postgres_url, tmp_path) as here:
            second = ArtifactServer(
                BlobStore(tmp_path), here.server._engine, "127.0.0.1", here.server.port, tmp_path, tmp_path, tmp_path
            )
            with pytest.raises(UserError, match=r"another program does.*artifacts_listen"):
                second.bind()

    asyncio.run(asyncio.wait_for(scenario(), 60))


@pytest.mark.postgres
def test_stopping_ends_a_transfer_that_nobody_reads(migrated_postgres_url: str, tmp_path: Path) -> None:
    async def scenario() -> None:
        # More than the buffers of both kernels' ends hold.
        content = bytes(64 << 20)
        digest = hashlib.sha256(content).hexdigest()
        async with site(migrated_postgres_url, tmp_path) as here:
            await BlobStore(tmp_path / "blobs").write(digest, pieces(content, 1 << 20))
            node = here.authority.issue("n1")
            context = ssl.create_default_context(cafile=str(here.authority.path))
            context.load_cert_chain(node.certificate, node.key)
            reader, writer = await asyncio.open_connection("localhost", here.server.port, ssl=context, limit=1024)
            writer.write(f"GET /artifacts/{digest} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
            assert (await reader.readline()).startswith(b"HTTP/1.1 200")
        # Leaving the block stopped the server, and with it the connection.
        received = 0
        with contextlib.suppress(ConnectionError, ssl.SSLError):
            while piece := await reader.read(1 << 20):
                received += len(piece)
        assert received < len(content)
        writer.close()

    asyncio.run(asyncio.wait_for(scenario(), 20))
