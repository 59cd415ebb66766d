"""The state folder of a node: made with tight rights, held by one agentd at a time, described by ``runtime.json``."""

from __future__ import annotations

import errno
import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from agentd.files import write_durably
from slmfleet.errors import UserError


def prepare(folder: Path) -> None:
    """Make the folder (mode 0700) where it is missing. Raises UserError."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise UserError(
            f"cannot use the state folder {folder}: {error.strerror}; choose another with --state-dir"
        ) from error


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Hold the folder for this process. Raises UserError when another agentd has it.

    The kernel frees the lock with the process, however it ends; the file itself stays.
    """
    prepare(folder)
    try:
        descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise UserError(f"cannot use the state folder {folder}: {error.strerror}; check its owner") from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
            raise UserError(
                f"another agentd (pid {_holder(descriptor)}) uses the state folder {folder}: stop it, or choose "
                "another folder with --state-dir"
            ) from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, str(os.getpid()).encode(), 0)
        yield
    finally:
        os.close(descriptor)


def _holder(descriptor: int) -> str:
    return os.pread(descriptor, 32, 0).decode(errors="replace").strip() or "unknown"


def write_runtime(folder: Path, facts: dict[str, Any]) -> None:
    """Say what runs now: ``{"pid", "api", "node_id", "name"}``."""
    write_durably(folder / "runtime.json", (json.dumps(facts) + "\n").encode())


def remove_runtime(folder: Path) -> None:
    """A clean stop leaves no runtime.json."""
    (folder / "runtime.json").unlink(missing_ok=True)


def read_runtime(folder: Path) -> dict[str, Any] | None:
    """What runs now; None when nothing does (no file, or a process that is gone)."""
    try:
        facts = json.loads((folder / "runtime.json").read_text())
        os.kill(int(facts["pid"]), 0)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return dict(facts)
