"""The artifact store: files by the SHA-256 of their content, in a folder.

``<root>/ab/ab12…`` holds a blob; it appears there by a rename, after its bytes were checked and forced to disk, so that
a name that exists always means verified content. ``<root>/incoming`` holds what is on its way; what a crash left there
is removed at the next start.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import os
import re
import shutil
import uuid
from collections.abc import AsyncIterable, Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from slmfleet.errors import UserError

CHUNK_BYTES = 1 << 20
_SHA256 = re.compile(r"[0-9a-f]{64}")
_FULL = (errno.ENOSPC, errno.EDQUOT)


class DigestMismatch(UserError):
    """The content is not what its digest says. Nothing was stored."""

    def __init__(self, what: str, expected: str, actual: str) -> None:
        super().__init__(
            f"{what} has SHA-256 {actual}, and {expected} was expected: it was changed, cut short or mixed up; "
            "correct the sha256 or the source"
        )
        self.expected = expected
        self.actual = actual


class StoreFull(UserError):
    """The disk is full. Nothing was stored; what was there stays whole."""


class BlobStore:
    """See the module's text. Methods that take long run in threads; any number may run at once."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._incoming = root / "incoming"

    def prepare(self) -> None:
        """Make the folders, and remove what a crash left half written. One process owns a store."""
        shutil.rmtree(self._incoming, ignore_errors=True)
        self._incoming.mkdir(parents=True)

    def path(self, sha256: str) -> Path:
        """Where the blob is, or would be. Raises ValueError when ``sha256`` is no lower-case hex digest."""
        if not _SHA256.fullmatch(sha256):
            raise ValueError(f"{sha256!r} is no SHA-256 in lower-case hex")
        return self._root / sha256[:2] / sha256

    def has(self, sha256: str) -> bool:
        """Whether the blob is here."""
        return self.path(sha256).is_file()

    def size(self, sha256: str) -> int:
        """Bytes of the blob. Raises FileNotFoundError."""
        return self.path(sha256).stat().st_size

    async def write(self, sha256: str, chunks: AsyncIterable[bytes]) -> int:
        """Store what ``chunks`` give, and check it on the way; returns the bytes.

        Raises DigestMismatch, StoreFull, or what ``chunks`` raises; then nothing was stored.
        """
        target = self.path(sha256)
        with self._temporary() as (file, temporary):
            hasher, size, waiting = hashlib.sha256(), 0, bytearray()

            def flush() -> None:
                hasher.update(waiting)
                file.write(waiting)

            async for chunk in chunks:
                waiting += chunk
                size += len(chunk)
                if len(waiting) >= CHUNK_BYTES:
                    await asyncio.to_thread(flush)
                    waiting = bytearray()
            await asyncio.to_thread(flush)
            if hasher.hexdigest() != sha256:
                raise DigestMismatch("what was sent", sha256, hasher.hexdigest())
            await asyncio.to_thread(_commit, file, temporary, target)
        return size

    async def adopt(self, path: Path, sha256: str, *, link: bool = False) -> int:
        """Store a local file; returns its bytes. ``link``: share its storage where the file system can (for a file that
        nobody will change, such as one of our cache). Raises DigestMismatch, StoreFull, OSError."""
        return await asyncio.to_thread(self._adopt, path, self.path(sha256), sha256, link)

    def _adopt(self, path: Path, target: Path, sha256: str, link: bool) -> int:
        if link and (size := self._link(path, target, sha256)) is not None:
            return size
        with self._temporary() as (file, temporary), path.open("rb") as source:
            actual = copy_and_hash(source, file)
            if actual != sha256:
                raise DigestMismatch(str(path), sha256, actual)
            size = file.tell()
            _commit(file, temporary, target)
        return size

    def _link(self, path: Path, target: Path, sha256: str) -> int | None:
        """The bytes of the blob, or None where files can't be linked."""
        actual = hash_file(path)
        if actual != sha256:
            raise DigestMismatch(str(path), sha256, actual)
        temporary = self._incoming / uuid.uuid4().hex
        try:
            self._incoming.mkdir(parents=True, exist_ok=True)
            os.link(path, temporary)
            with temporary.open("rb") as file:
                _commit(file, temporary, target)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            if error.errno in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.EACCES):
                return None
            raise
        return target.stat().st_size

    @contextlib.contextmanager
    def _temporary(self) -> Iterator[tuple[BinaryIO, Path]]:
        temporary = self._incoming / uuid.uuid4().hex
        try:
            self._incoming.mkdir(parents=True, exist_ok=True)
            with temporary.open("xb") as file:
                yield file, temporary
        except OSError as error:
            if error.errno in _FULL:
                raise StoreFull(
                    f"the disk of the artifact store {self._root} is full: free some space there, then try again"
                ) from error
            raise
        finally:
            temporary.unlink(missing_ok=True)


def hash_file(path: Path) -> str:
    """Hex SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def copy_and_hash(source: BinaryIO, target: BinaryIO, copied: Callable[[int], None] | None = None) -> str:
    """Copy all of it; the hex SHA-256. ``copied(bytes)`` is called for each piece."""
    hasher = hashlib.sha256()
    while chunk := source.read(CHUNK_BYTES):
        hasher.update(chunk)
        target.write(chunk)
        if copied:
            copied(len(chunk))
    return hasher.hexdigest()


def _commit(file: BinaryIO, temporary: Path, target: Path) -> None:
    """Force the bytes to disk, then give them their name, then force the name to disk."""
    if file.writable():
        file.flush()
        os.fchmod(file.fileno(), 0o444)
    os.fsync(file.fileno())
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary.rename(target)
    for folder in (target.parent, target.parent.parent):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
