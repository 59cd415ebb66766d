"""How much memory the kernel has to give: the machine's, and that of the cgroups this process is in.

MemAvailable, never MemFree: what the kernel would free for a new program counts. Sources: proc(5), and the kernel's
Documentation/admin-guide/cgroup-v1/memory.rst and cgroup-v2.rst.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

# cgroup v1 writes "no limit" as a number near 2**63.
_UNLIMITED = 1 << 60


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes: what this process and its children may use at most, and what is still to be had."""

    total: int
    available: int


def read_memory(root: Path = Path("/")) -> Memory:
    """The tightest of the machine and all cgroups above this process. ``root`` is for tests."""
    fields = {}
    for line in (root / "proc/meminfo").read_text().splitlines():
        name, _, value = line.partition(":")
        fields[name] = int(value.split()[0]) * 1024
    memory = Memory(fields["MemTotal"], fields.get("MemAvailable", fields.get("MemFree", 0)))
    for folder in _memory_cgroups(root):
        limits = _cgroup_memory(folder)
        if limits is not None:
            memory = Memory(min(memory.total, limits.total), min(memory.available, limits.available))
    return memory


def _memory_cgroups(root: Path) -> list[Path]:
    """This process's memory cgroup and its parents, in v2 and in v1; those that are visible here."""
    folders: list[Path] = []
    with contextlib.suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers == "":
                top = root / "sys/fs/cgroup"
            elif "memory" in controllers.split(","):
                top = root / "sys/fs/cgroup/memory"
            else:
                continue
            inner = path.strip("/")
            folder = top / inner if inner and (top / inner).is_dir() else top
            folders += [folder, *(p for p in folder.parents if p == top or top in p.parents)]
    return folders


def _cgroup_memory(folder: Path) -> Memory | None:
    for limit_name, usage_name, inactive in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        with contextlib.suppress(OSError, ValueError):
            text = (folder / limit_name).read_text().strip()
            if text == "max" or int(text) >= _UNLIMITED:
                return None
            used = int((folder / usage_name).read_text())
            # Cached files that nobody touched lately are charged but are the first to go.
            used -= _stat(folder / "memory.stat", inactive)
            return Memory(int(text), max(0, int(text) - used))
    return None


def _stat(path: Path, name: str) -> int:
    for line in path.read_text().splitlines():
        key, _, value = line.partition(" ")
        if key == name:
            return int(value)
    return 0


def stalled_fraction(root: Path = Path("/"), group: Path | None = None) -> float:
    """Share of the last 10 s in which some task waited for memory (PSI), 0 to 1; 0 where the kernel does not tell.

    Of the tasks in the cgroup ``group`` where that is v2, else of the whole system (Documentation/accounting/psi.rst).
    """
    for file in (group / "memory.pressure" if group else None, root / "proc/pressure/memory"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            for line in file.read_text().splitlines() if file else ():
                if line.startswith("some"):
                    return float(line.split()[1].removeprefix("avg10=")) / 100
    return 0.0
