"""Limits that the kernel enforces on one worker: a cgroup of its own, v2 or v1, whichever is mounted and writable.

Sources: the kernel's Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/{memory,pids}.rst, and
Documentation/scheduler/sched-bwc.rst. The child enters its group by itself, before its exec.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_PERIOD_US = 100_000
_CONTROLLERS_V1 = ("memory", "cpu", "pids")
_CONTROLLERS_V2 = ("cpu", "memory", "pids")
# The group that holds one agentd's groups, and in v2 the leaf that agentd itself moves to.
_PARENT = "slmfleet"
_LEAF = "agentd"


@dataclass(frozen=True, slots=True)
class Limits:
    """0 means no limit."""

    # Private and cached memory together; over it, the kernel kills inside the group alone.
    memory_bytes: int = 0
    # Processors, such as 1.5.
    cpus: float = 0.0
    # Processes and threads.
    pids: int = 0


@dataclass(frozen=True, slots=True)
class Group:
    """One worker's cgroup: a folder per hierarchy in v1, one folder in v2."""

    folders: Mapping[str, Path]
    limits: Limits

    @property
    def enter(self) -> Sequence[Path]:
        """Files that a process writes "0" to in order to enter."""
        return [folder / "cgroup.procs" for folder in dict.fromkeys(self.folders.values())]

    def oom_kills(self) -> int:
        """How many processes of the group the kernel killed for its memory limit."""
        memory = self.folders.get("memory")
        for name in ("memory.events", "memory.oom_control"):
            with contextlib.suppress(OSError, ValueError, AttributeError):
                for line in (memory / name).read_text().splitlines():  # type: ignore[operator]
                    key, _, value = line.partition(" ")
                    if key == "oom_kill":
                        return int(value)
        return 0

    def remove(self) -> None:
        """Remove the group; its processes must be gone."""
        for folder in dict.fromkeys(self.folders.values()):
            with contextlib.suppress(OSError):
                folder.rmdir()


class Cgroups:
    """Makes groups under one parent. ``unsupported`` names the controllers that are missing here."""

    def __init__(self, version: int, parents: Mapping[str, Path]) -> None:
        self.version = version
        self._parents = parents
        wanted = _CONTROLLERS_V1 if version == 1 else _CONTROLLERS_V2
        self.unsupported = tuple(name for name in wanted if name not in parents)

    def create(self, name: str, limits: Limits) -> Group:
        """A new group with these limits. Raises OSError if the kernel refuses."""
        folders = {controller: parent / name for controller, parent in self._parents.items()}
        group = Group(folders, limits)
        try:
            for folder in dict.fromkeys(folders.values()):
                folder.mkdir(exist_ok=True)
            for controller, file, value in _settings(self.version, limits):
                if controller in folders:
                    (folders[controller] / file).write_text(value)
        except OSError:
            group.remove()
            raise
        return group

    def sweep(self, prefix: str, is_alive: Callable[[int], bool]) -> None:
        """Remove the empty groups ``<prefix><pid>-<serial>`` of agentds that are gone. Those of one that lives may be
        about to be entered: several nodes on one machine share the parent."""
        for parent in dict.fromkeys(self._parents.values()):
            for folder in parent.glob(f"{prefix}*"):
                pid = folder.name.removeprefix(prefix).partition("-")[0]
                if not (pid.isdigit() and is_alive(int(pid))):
                    with contextlib.suppress(OSError):
                        folder.rmdir()


def _settings(version: int, limits: Limits) -> list[tuple[str, str, str]]:
    """Controller, file, value. The order matters: v1 wants the plain limit before the one that includes swap."""
    found: list[tuple[str, str, str]] = []
    if limits.memory_bytes:
        if version == 1:
            found.append(("memory", "memory.limit_in_bytes", str(limits.memory_bytes)))
        else:
            found.append(("memory", "memory.max", str(limits.memory_bytes)))
            # Slowed before it is killed, so that a slow leak is seen as pressure first.
            found.append(("memory", "memory.high", str(int(limits.memory_bytes * 0.95))))
            # The whole worker goes, never one of its threads' processes.
            found.append(("memory", "memory.oom.group", "1"))
    if limits.cpus:
        quota = max(1000, int(limits.cpus * _PERIOD_US))
        if version == 1:
            found.append(("cpu", "cpu.cfs_period_us", str(_PERIOD_US)))
            found.append(("cpu", "cpu.cfs_quota_us", str(quota)))
        else:
            found.append(("cpu", "cpu.max", f"{quota} {_PERIOD_US}"))
    if limits.pids:
        found.append(("pids", "pids.max", str(limits.pids)))
    return found


def open_cgroups(root: Path = Path("/")) -> Cgroups | None:
    """The cgroups that this process may make, or None where it may make none. ``root`` is for tests.

    v2 with its controllers is preferred; there this process first moves to a leaf, because a v2 group may hold
    processes or groups with controllers, not both.
    """
    own = _own_groups(root)
    return _open_v2(root, own.get("")) or _open_v1(root, own)


def _own_groups(root: Path) -> dict[str, str]:
    """Controller ("" in v2) -> path of this process's group."""
    groups: dict[str, str] = {}
    with contextlib.suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            for controller in controllers.split(","):
                groups[controller] = path
    return groups


def _open_v2(root: Path, path: str | None) -> Cgroups | None:
    if path is None:
        return None
    own = _visible(root / "sys/fs/cgroup", path)
    if own.name == _LEAF and (own.parent / _PARENT).is_dir():
        # This process is in the leaf already: an agentd that was started by another in the same unit.
        own = own.parent
    try:
        offered = (own / "cgroup.controllers").read_text().split()
        wanted = [name for name in _CONTROLLERS_V2 if name in offered]
        if "memory" not in wanted:
            return None
        leaf = own / _LEAF
        leaf.mkdir(exist_ok=True)
        (leaf / "cgroup.procs").write_text(str(os.getpid()))
        (own / "cgroup.subtree_control").write_text(" ".join(f"+{name}" for name in wanted))
        parent = own / _PARENT
        parent.mkdir(exist_ok=True)
        (parent / "cgroup.subtree_control").write_text(" ".join(f"+{name}" for name in wanted))
    except OSError:
        return None
    return Cgroups(2, dict.fromkeys(wanted, parent))


def _open_v1(root: Path, own: Mapping[str, str]) -> Cgroups | None:
    parents: dict[str, Path] = {}
    for controller in _CONTROLLERS_V1:
        if controller in own:
            parent = _visible(root / "sys/fs/cgroup" / controller, own[controller]) / _PARENT
            with contextlib.suppress(OSError):
                parent.mkdir(exist_ok=True)
                # An agentd of another user, root's say, may have made it, and left it behind: that one is not ours.
                if os.access(parent, os.W_OK | os.X_OK, effective_ids=True):
                    parents[controller] = parent
    return Cgroups(1, parents) if "memory" in parents else None


def _visible(top: Path, path: str) -> Path:
    """The folder of a group; inside a container its path may be that of the host, and the mount is the group."""
    folder = top / path.strip("/")
    return folder if folder.is_dir() else top
