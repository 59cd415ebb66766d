"""The content-addressed store of model files.

``blobs/<sha256>`` holds verified files only, each once however many versions share it; ``partial/<sha256>`` holds
what a download has so far; ``views/<model digest>/<variant>/<name>`` are hard links, which is how a runtime sees a
variant.
A blob counts as verified while its inode, size and modification time are those that were remembered when its digest
was computed: hashing gigabytes at each start would take minutes.

All methods do I/O; call them off the event loop. One caller at a time (the convergence loop) changes the store.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from agentd.artifacts.attempt import Cancelled, Stop
from agentd.files import fsync_folder

_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class Blob:
    """One file in ``blobs/``, as the file system describes it."""

    sha256: str
    inode: int
    size_bytes: int
    mtime_ns: int


class ArtifactStore:
    """The folders ``blobs``, ``partial`` and ``views`` under ``root``."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._blobs = root / "blobs"
        self._partial = root / "partial"
        self._views = root / "views"
        for folder in (self._blobs, self._partial, self._views):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)

    def blob_path(self, sha256: str) -> Path:
        """Where the file with this digest is or will be."""
        return self._blobs / sha256

    def partial_path(self, sha256: str) -> Path:
        """Where its download grows."""
        return self._partial / sha256

    def view_path(self, digest: str, variant: str) -> Path:
        """The folder in which a runtime finds a variant's files by name."""
        return self._views / digest / variant

    def blobs(self) -> list[Blob]:
        """Every file in ``blobs/``, verified or not."""
        found = []
        with os.scandir(self._blobs) as entries:
            for entry in entries:
                status = entry.stat()
                found.append(Blob(entry.name, status.st_ino, status.st_size, status.st_mtime_ns))
        return found

    def partial_sizes(self) -> dict[str, int]:
        """Bytes that each unfinished download has."""
        with os.scandir(self._partial) as entries:
            return {entry.name: entry.stat().st_size for entry in entries}

    def free_bytes(self) -> int:
        """Free space of the file system, for ordinary users."""
        return shutil.disk_usage(self.root).free

    def verify(self, sha256: str, stop: Stop) -> Blob | None:
        """Read a blob that is there already; a wrong one is deleted, and None is returned. Raises Cancelled."""
        path = self.blob_path(sha256)
        before = path.stat()
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                if stop.is_set():
                    raise Cancelled
                digest.update(chunk)
        if digest.hexdigest() != sha256:
            path.unlink()
            fsync_folder(self._blobs)
            return None
        return Blob(sha256, before.st_ino, before.st_size, before.st_mtime_ns)

    def adopt(self, sha256: str) -> Blob:
        """Make a partial file, whose bytes were checked and fsynced by the caller, a blob."""
        target = self.blob_path(sha256)
        # Weights are never written again: a runtime with a bug must not be able to change what was verified.
        self.partial_path(sha256).chmod(0o400)
        self.partial_path(sha256).rename(target)
        fsync_folder(self._blobs)
        status = target.stat()
        return Blob(sha256, status.st_ino, status.st_size, status.st_mtime_ns)

    def link_view(self, digest: str, variant: str, files: list[tuple[str, str]]) -> Path:
        """Make the folder of a variant out of (name, sha256) pairs; the folder. Does nothing where it is right."""
        view = self.view_path(digest, variant)
        wanted = {name: self.blob_path(sha256) for name, sha256 in files}
        for name, blob in wanted.items():
            link = view / name
            link.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            if link.exists() and link.samefile(blob):
                continue
            link.unlink(missing_ok=True)
            _link(blob, link)
        for stray in _files_under(view):
            if str(stray.relative_to(view)) not in wanted:
                stray.unlink()
        return view

    def views(self) -> set[tuple[str, str]]:
        """(model digest, variant) of every view."""
        return {
            (model.name, variant.name)
            for model in self._views.iterdir()
            if model.is_dir()
            for variant in model.iterdir()
        }

    def remove_view(self, digest: str, variant: str) -> None:
        """Unlink a view; its blobs stay until they are removed."""
        shutil.rmtree(self.view_path(digest, variant), ignore_errors=True)
        folder = self._views / digest
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()

    def remove_blob(self, sha256: str) -> None:
        """Delete a file; its space is free once no view links it."""
        self.blob_path(sha256).unlink(missing_ok=True)

    def remove_partial(self, sha256: str) -> None:
        """Forget an unfinished download."""
        self.partial_path(sha256).unlink(missing_ok=True)


def _link(blob: Path, link: Path) -> None:
    """A hard link: runtimes that resolve symbolic ones would look for a model's other files among the blobs. Where
    the file system has none (exFAT, some FUSE), a symbolic one."""
    try:
        os.link(blob, link)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EMLINK):
            raise
        link.symlink_to(os.path.relpath(blob, link.parent))


def _files_under(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() or path.is_symlink()]
