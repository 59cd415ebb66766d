"""The power fails at every write of a download, of a small state file and of the node's database."""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
import shutil
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from agentd.artifacts.attempt import FetchFailed, Stop
from agentd.artifacts.fetch import fetch
from agentd.artifacts.store import ArtifactStore
from agentd.files import write_durably
from agentd.identity import keys
from agentd.identity.files import Endpoints, Identity
from agentd.store.database import Database
from agentd.store.desired import DesiredStore, StoredState
from agentd.store.outbox import Outbox
from controlplane.node_api.pki import Pki
from tests.reliability.power import lay_out, recorded
from tests.support.fake_controlplane import FileServer

CONTENT = os.urandom(150_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()
MODEL, VARIANT, NAME = "ab" * 32, "q4", "model.gguf"
# A sector: the most that a disk promises to write whole.
SECTOR = 512


class Downloads:
    """A file server and somebody who fetches from it."""

    def __init__(self, folder: Path) -> None:
        pki = Pki.open(folder / "pki")
        self.server = FileServer(pki, {SHA256: CONTENT})
        mine = folder / "identity"
        mine.mkdir()
        key = keys.load_or_make(mine / "client.key")
        signed = pki.sign_node_csr(keys.signing_request(key, "n1"), "id-n1")
        (mine / "client.pem").write_text(signed.chain_pem)
        (mine / "ca.pem").write_bytes(pki.ca_pem)
        self._context = Identity(mine, "id-n1", "n1", Endpoints("", "", ""), 0.0, 0.0).ssl_context()

    def bring(self, store: ArtifactStore) -> int:
        """Fetch, adopt, link, as the convergence loop does; where it was resumed from."""
        url = f"https://127.0.0.1:{self.server.port}"
        done = fetch(url, SHA256, len(CONTENT), store.partial_path(SHA256), self._context, Stop())
        store.adopt(SHA256)
        store.link_view(MODEL, VARIANT, [(NAME, SHA256)])
        return done.resumed_from


@pytest.fixture
def downloads(tmp_path: Path) -> Iterator[Downloads]:
    made = Downloads(tmp_path)
    made.server.start()
    yield made
    made.server.stop()


def test_a_download_that_is_cut_at_every_write_resumes_or_begins_anew(downloads: Downloads, tmp_path: Path) -> None:
    root = tmp_path / "artifacts"
    store = ArtifactStore(root)
    with recorded(root) as recording:
        downloads.bring(store)
    cuts = resumed = there = 0
    for story, _, names, content in recording.cuts():
        cuts += 1
        folder = tmp_path / f"cut-{cuts}"
        lay_out(names, content, folder)
        for blob in (folder / "blobs").glob("*"):
            assert hashlib.sha256(blob.read_bytes()).hexdigest() == blob.name, story
        after = ArtifactStore(folder)
        if after.blobs():
            there += 1
            assert after.verify(SHA256, Stop()) is not None, story
            after.link_view(MODEL, VARIANT, [(NAME, SHA256)])
        else:
            resumed += _bring_in_two(downloads, after, story) > 0
        assert (after.view_path(MODEL, VARIANT) / NAME).read_bytes() == CONTENT, story
        assert after.partial_sizes() == {}, story
        shutil.rmtree(folder)
    print(
        f"power: {len(recording.moments)} moments of a download, {cuts} cuts, {resumed} resumed, {there} had it whole"
    )
    assert len(recording.moments) > 8
    assert resumed > 0
    assert there > 0


def _bring_in_two(downloads: Downloads, store: ArtifactStore, story: str) -> int:
    """Bytes that were never synced may be there as zeros: the first attempt then deletes them, the second begins
    anew."""
    try:
        return downloads.bring(store)
    except FetchFailed as error:
        reason = error.reason
    assert reason == "DigestMismatch", story
    return downloads.bring(store)


@pytest.mark.parametrize("before", [None, b"old " * 1000])
def test_a_state_file_is_the_old_one_or_the_new_one(tmp_path: Path, before: bytes | None) -> None:
    root, new = tmp_path / "state", b"new " * 3000
    root.mkdir()
    if before is not None:
        (root / "node.json").write_bytes(before)
    with recorded(root) as recording:
        write_durably(root / "node.json", new)
    seen = set()
    for number, (story, _, names, content) in enumerate(recording.cuts()):
        lay_out(names, content, tmp_path / f"cut-{number}")
        file = tmp_path / f"cut-{number}" / "node.json"
        found = file.read_bytes() if file.exists() else None
        assert found in (before, new), story
        seen.add(found)
    assert seen == {before, new}
    last = recording.moments[-1]
    assert last.synced_content[last.synced_names["node.json"]] == new


# --- the database -----------------------------------------------------------------------------------------------------


class Disk:
    """The two files that a power cut leaves of an SQLite database in WAL mode; the third is rebuilt from them."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> tuple[bytes, bytes]:
        """Database and write-ahead log."""
        log = self.path.with_name(self.path.name + "-wal")
        return self.path.read_bytes(), log.read_bytes() if log.exists() else b""

    @staticmethod
    def lay(folder: Path, database: bytes, log: bytes) -> Path:
        """The files in a new folder."""
        folder.mkdir()
        (folder / "store.db").write_bytes(database)
        (folder / "store.db-wal").write_bytes(log)
        return folder / "store.db"


def torn(before: bytes, after: bytes) -> Iterator[tuple[str, bytes]]:
    """``after`` as it may stand on the disk when its writing over ``before`` was cut: up to some sector it is there;
    behind it each sector that was there before is the old one, and new ones are missing, zeros or noise."""
    written = [n for n in range(0, len(after), SECTOR) if after[n : n + SECTOR] != before[n : n + SECTOR]]
    first, last = written[0], min(written[-1] + SECTOR, len(after))
    noise = bytes(range(1, 256)) * (len(after) // 255 + 1)
    for end in range(first, last, SECTOR):
        there = after[:end] + before[end:]
        yield f"nothing behind {end}", there
        if len(there) < len(after):
            grown = -(-len(there) // SECTOR) * SECTOR
            whole = there.ljust(grown, b"\x00")
            yield f"zeros behind {end}", whole.ljust(len(after), b"\x00")
            yield f"noise behind {end}", whole + noise[: len(after) - grown]


def state(generation: int, size: int = 3000) -> StoredState:
    document = bytes([generation % 256]) * size
    return StoredState("t", generation, hashlib.sha256(document).digest(), document)


async def _reopened(path: Path) -> tuple[StoredState | None, int]:
    database = await Database.open(path)
    try:
        found = await DesiredStore(database).load()
        size = await Outbox(database, "b", 10**9).size()
    finally:
        await database.close()
    return found, size.rows


Work = Callable[[Database], Awaitable[None]]


async def _wrote(path: Path, prepare: Work, work: Work) -> tuple[tuple[bytes, bytes], tuple[bytes, bytes]]:
    """What the disk held before and after ``work``, in one run of the database that began with ``prepare``."""
    database = await Database.open(path)
    try:
        await prepare(database)
        before = Disk(path).read()
        await work(database)
        return before, Disk(path).read()
    finally:
        await database.close()


@pytest.mark.parametrize("saves", [1, 60], ids=["into a fresh log", "into a log that began anew"])
def test_a_desired_state_is_the_old_one_or_the_new_one(tmp_path: Path, saves: int) -> None:
    async def test() -> int:
        old, new = state(saves), state(saves + 1)
        path = tmp_path / "store.db"

        async def prepare(database: Database) -> None:
            for generation in range(1, saves + 1):
                # Large ones fill the log, which SQLite then starts over from its beginning.
                await DesiredStore(database).save(state(generation, 3000 if generation == saves else 100_000))

        before, after = await _wrote(path, prepare, lambda database: DesiredStore(database).save(new))
        assert before[0] == after[0], "the write went into the log alone"
        assert (len(after[1]) == len(before[1])) == (saves > 1), "an old log is written over"
        cuts = 0
        seen = set()
        for story, log in torn(before[1], after[1]):
            cuts += 1
            found, _ = await _reopened(Disk.lay(tmp_path / f"cut-{cuts}", after[0], log))
            assert found in (old, new), story
            seen.add(found)
        found, _ = await _reopened(Disk.lay(tmp_path / "whole", *after))
        assert found == new
        assert old in seen
        return cuts

    print(f"power: {asyncio.run(test())} cuts of a desired state in the database's log")


async def nothing(_: Database) -> None:
    """No preparation."""


def test_rows_of_the_outbox_are_all_there_or_none(tmp_path: Path) -> None:
    async def test() -> int:
        path = tmp_path / "store.db"

        async def append(database: Database) -> None:
            await Outbox(database, "b", 10**9).append("events", [lambda number: f"row {number}".encode() * 20] * 10)

        before, after = await _wrote(path, nothing, append)
        cuts = 0
        for story, log in torn(before[1], after[1]):
            cuts += 1
            _, rows = await _reopened(Disk.lay(tmp_path / f"cut-{cuts}", after[0], log))
            assert rows in (0, 10), story
        _, rows = await _reopened(Disk.lay(tmp_path / "whole", *after))
        assert rows == 10
        return cuts

    print(f"power: {asyncio.run(test())} cuts of a transaction of the outbox")


def test_a_checkpoint_that_is_cut_anywhere_loses_nothing(tmp_path: Path) -> None:
    async def test() -> int:
        path, new = tmp_path / "store.db", state(7, 20_000)

        async def prepare(database: Database) -> None:
            await DesiredStore(database).save(new)

        database = await Database.open(path)
        await prepare(database)
        before = Disk(path).read()
        await database.close()
        after, _ = Disk(path).read()
        cuts = 0
        # SQLite syncs the log before it writes the database, and keeps it until the database is synced. In between
        # each sector of the database may be the old one or the new one.
        chance = random.Random(1)
        for end in range(0, len(after) + 1, 4 * SECTOR):
            some = [chance.random() < 0.5 for _ in range(0, len(after), SECTOR)]
            for kind, file in (("in order", after[:end] + before[0][end:]), ("mixed", _mixed(before[0], after, some))):
                cuts += 1
                found, _ = await _reopened(Disk.lay(tmp_path / f"cut-{cuts}", file, before[1]))
                assert found == new, f"{kind} {end}"
        return cuts

    print(f"power: {asyncio.run(test())} cuts of a checkpoint")


def _mixed(before: bytes, after: bytes, written: list[bool]) -> bytes:
    before = before.ljust(len(after), b"\x00")
    return b"".join(
        (after if new else before)[number * SECTOR : (number + 1) * SECTOR] for number, new in enumerate(written)
    )
