"""What hardware and software a node has: facts that change seldom, sent with each Hello."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Sequence
from pathlib import Path

from slmfleet.v1 import state_pb2 as pb
from slmfleet.variants import Hardware


def take(models_folder: Path, formats: Sequence[str], limits: str) -> pb.Inventory:
    """The inventory; ``models_folder`` says which file system counts, ``limits`` how limits are enforced here."""
    disk = shutil.disk_usage(models_folder)
    return pb.Inventory(
        hostname=platform.node(),
        machine=platform.machine(),
        os=_os_name(),
        kernel=platform.release(),
        cpu_model=cpu_model(Path("/proc/cpuinfo")),
        cpu_count=len(os.sched_getaffinity(0)),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        disk_bytes=disk.total,
        disk_free_bytes=disk.free,
        formats=formats,
        accelerators=accelerators(Path("/dev")),
        limits=limits,
    )


def model_hardware(max_memory_bytes: int) -> Hardware:
    """What the choice of a model's variant depends on; ``max_memory_bytes`` as configured, 0 = 80 % of the memory."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    share = int(total * 0.8)
    return Hardware(
        model_bytes=min(max_memory_bytes, share) if max_memory_bytes else share,
        cores=len(os.sched_getaffinity(0)),
        accelerators=frozenset(accelerators(Path("/dev"))),
    )


def _os_name() -> str:
    try:
        return platform.freedesktop_os_release().get("PRETTY_NAME", platform.system())
    except OSError:
        return platform.system()


def cpu_model(cpuinfo: Path) -> str:
    """The processor's name: ``model name`` on x86, ``Model`` (the board) on many ARM systems, "" when unknown."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return ""
    values = {key.strip().lower(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    return values.get("model name") or values.get("model") or values.get("hardware") or ""


def accelerators(devices: Path) -> list[str]:
    """Accelerators by their device files; a name here says that the device exists, not that a backend uses it."""
    found = []
    if (devices / "nvidia0").exists():
        found.append("nvidia")
    if (devices / "kfd").exists():
        found.append("amd")
    if (devices / "accel").is_dir() or (devices / "accel0").exists():
        found.append("npu")
    if any(devices.glob("dri/renderD*")):
        found.append("gpu")
    return found


def limits_kind(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> str:
    """How limits can be enforced here: "cgroup2" or "cgroup1" where agentd may make groups, else "watchdog"."""
    try:
        entries = [line.split(":", 2) for line in own.read_text().splitlines()]
    except OSError:
        return "watchdog"
    for _, controllers, path in entries:
        if not controllers and (root / "cgroup.controllers").exists():
            group = root / path.lstrip("/")
            if "memory" in _words(group / "cgroup.controllers") and os.access(group / "cgroup.procs", os.W_OK):
                return "cgroup2"
        if "memory" in controllers.split(","):
            # In a container the own path may not be visible; the root of the mount is then what we have.
            group = root / "memory" / path.lstrip("/")
            if os.access(group if group.is_dir() else root / "memory", os.W_OK):
                return "cgroup1"
    return "watchdog"


def _words(file: Path) -> list[str]:
    try:
        return file.read_text().split()
    except OSError:
        return []
