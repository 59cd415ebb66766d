"""What a disk may hold when the power fails: after every step of a program that writes files.

``recorded(root)`` watches the calling thread: after each call into C that may touch files it notes the folder, and by
wrapping ``os.fsync`` it knows what is durable. ``cuts`` then gives, for each distinct moment, the folders that a power
cut at that moment may leave behind (POSIX promises no more than what was fsynced; see Pillai et al., "All File Systems
Are Not Created Equal", OSDI 2014):

- ``kept``: everything reached the disk, as when only the process dies;
- ``names``: names reached it, bytes that were not fsynced did not (zeros in their place, or nothing);
- ``synced``: neither bytes nor names that were not fsynced.
"""

from __future__ import annotations

import contextlib
import os
import stat
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_TOUCHES_FILES = frozenset(
    (
        *("write", "flush", "truncate", "close", "fsync", "open", "__exit__", "chmod"),
        *("rename", "replace", "unlink", "remove", "link", "symlink", "mkdir", "rmdir"),
    )
)

# Relative path -> inode of a file; folders are paths with inode 0.
Names = dict[str, int]


@dataclass(frozen=True)
class Moment:
    """The folder as processes see it, and what of it is durable."""

    after: str
    names: Names
    content: dict[int, bytes]
    synced_names: Names
    synced_content: dict[int, bytes]


@dataclass
class Recording:
    """Distinct moments in their order."""

    root: Path
    moments: list[Moment] = field(default_factory=list)

    def cuts(self) -> Iterator[tuple[str, Moment, Names, dict[int, bytes]]]:
        """(description, moment, names, bytes by inode) of every folder that a cut may leave."""
        for number, moment in enumerate(self.moments):
            lost = {inode: moment.synced_content.get(inode, b"") for inode in moment.content}
            zeros = {
                inode: lost[inode] + bytes(max(0, len(content) - len(lost[inode])))
                for inode, content in moment.content.items()
            }
            where = f"cut {number} after {moment.after}"
            yield f"{where}: kept", moment, moment.names, moment.content
            yield f"{where}: names, bytes empty", moment, moment.names, lost
            yield f"{where}: names, bytes zero", moment, moment.names, zeros
            yield f"{where}: synced", moment, moment.synced_names, moment.synced_content


def lay_out(names: Names, content: dict[int, bytes], folder: Path) -> None:
    """Make the folder that a cut leaves."""
    made: dict[int, Path] = {}
    folder.mkdir()
    for name, inode in sorted(names.items()):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not inode:
            path.mkdir(exist_ok=True)
        elif inode in made:
            os.link(made[inode], path)
        else:
            path.write_bytes(content.get(inode, b""))
            made[inode] = path


class _Recorder:
    def __init__(self, root: Path) -> None:
        self.recording = Recording(root)
        self._root = root
        self._fsync = os.fsync
        self._synced_content: dict[int, bytes] = {}
        self._synced_names: Names = {}
        self._last: tuple[Any, ...] = ()
        names, content = self._look()
        # What was there before counts as durable.
        self._synced_names, self._synced_content = dict(names), dict(content)

    def profile(self, _frame: Any, event: str, function: Any) -> None:
        if event == "c_return" and getattr(function, "__name__", "") in _TOUCHES_FILES:
            self.note(function.__name__)

    def fsync(self, descriptor: int) -> None:
        self._fsync(descriptor)
        sys.setprofile(None)
        status = os.fstat(descriptor)
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        if path.is_relative_to(self._root):
            if stat.S_ISDIR(status.st_mode):
                self._sync_folder(path)
            else:
                self._synced_content[status.st_ino] = path.read_bytes()
            self.note("fsync")
        sys.setprofile(self.profile)

    def _sync_folder(self, path: Path) -> None:
        relative = "" if path == self._root else str(path.relative_to(self._root))
        names, _ = self._look()

        def inside(name: str) -> bool:
            return os.path.dirname(name) == relative

        kept = {name: inode for name, inode in self._synced_names.items() if not inside(name)}
        self._synced_names = kept | {name: inode for name, inode in names.items() if inside(name)}

    def note(self, after: str) -> None:
        names, content = self._look()
        state = (names, content, dict(self._synced_names), dict(self._synced_content))
        if state != self._last:
            self._last = state
            self.recording.moments.append(Moment(after, *state))

    def _look(self) -> tuple[Names, dict[int, bytes]]:
        names: Names = {}
        content: dict[int, bytes] = {}
        for folder, folders, files in os.walk(self._root):
            where = Path(folder).relative_to(self._root)
            names |= {str(where / name): 0 for name in folders}
            for name in files:
                inode = (Path(folder) / name).stat().st_ino
                names[str(where / name)] = inode
                content[inode] = (Path(folder) / name).read_bytes()
        return names, content


@contextlib.contextmanager
def recorded(root: Path) -> Iterator[Recording]:
    """Record what the calling thread does to files under ``root``."""
    recorder = _Recorder(root)
    recorder.note("the start")
    os.fsync, original = recorder.fsync, os.fsync
    sys.setprofile(recorder.profile)
    try:
        yield recorder.recording
    finally:
        sys.setprofile(None)
        os.fsync = original
