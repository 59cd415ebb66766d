"""The data folder: held by one control plane at a time, with its first API key and what runs now.

``lock``          held (flock) by the running program
``replica-id``    names this replica in the database, across restarts
``ports.json``    the ports that were taken last time: nodes that enrolled look for them again
``admin.token``, ``runtime.json``: docs/architecture.md
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from slmfleet.errors import UserError


@contextlib.contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Make the folder (0700) and hold it. Raises UserError when another control plane does, or it can't be written."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise UserError(f"cannot use the data folder {folder}: {error.strerror}; give another --data-dir") from None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            holder = os.pread(descriptor, 20, 0).decode(errors="replace").strip()
            by = f" (pid {holder})" if holder.isdecimal() else ""
            raise UserError(f"another controlplane{by} runs on {folder}: stop it, or give another --data-dir") from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)


def write_whole(path: Path, text: str, mode: int = 0o644) -> None:
    """Write a file so that it is there whole or not at all, also after a power cut."""
    fresh = path.with_name(path.name + ".new")
    with contextlib.suppress(FileNotFoundError):
        fresh.unlink()
    try:
        with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            fresh.unlink()
        raise UserError(f"cannot write {path}: {error.strerror}") from None


def replica_id(folder: Path) -> str:
    """The id of this replica, made at first use."""
    path = folder / "replica-id"
    with contextlib.suppress(FileNotFoundError):
        if found := path.read_text().strip():
            return found
    made = str(uuid.uuid4())
    write_whole(path, made + "\n")
    return made


def read_admin_token(folder: Path) -> str | None:
    """The first API key, if it was written here."""
    try:
        return (folder / "admin.token").read_text().strip() or None
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"cannot read {folder / 'admin.token'}: {error.strerror}") from None


def write_admin_token(folder: Path, secret: str) -> None:
    """Keep the first API key, for its owner alone."""
    write_whole(folder / "admin.token", secret + "\n", 0o600)


def last_ports(folder: Path) -> dict[str, int]:
    """Ports of the last run by name; empty when there was none."""
    try:
        found = json.loads((folder / "ports.json").read_text())
    except (OSError, ValueError):
        return {}
    known = found if isinstance(found, dict) else {}
    return {str(name): port for name, port in known.items() if isinstance(port, int) and 0 < port < 65536}


def remember_ports(folder: Path, ports: Mapping[str, int]) -> None:
    """For ``last_ports`` of the next run."""
    write_whole(folder / "ports.json", json.dumps(dict(ports), sort_keys=True) + "\n")


def write_runtime(folder: Path, facts: Mapping[str, Any]) -> None:
    """Say what runs now."""
    write_whole(folder / "runtime.json", json.dumps(dict(facts)) + "\n")


def remove_runtime(folder: Path) -> None:
    """A clean stop leaves none."""
    with contextlib.suppress(OSError):
        (folder / "runtime.json").unlink()
