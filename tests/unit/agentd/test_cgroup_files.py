"""What is written where, on file systems that look like cgroup v1 and v2, and what the kernel has to give."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from agentd.device.cgroups import Limits, open_cgroups
from agentd.device.pressure import Memory, read_memory, stalled_fraction

MB = 10**6
LIMITS = Limits(memory_bytes=100 * MB, cpus=1.5, pids=64)


def write(path: Path, text: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.fixture
def v2(tmp_path: Path) -> Path:
    write(tmp_path / "proc/self/cgroup", "0::/system.slice/agentd.service\n")
    write(tmp_path / "sys/fs/cgroup/system.slice/agentd.service/cgroup.controllers", "cpuset cpu io memory pids\n")
    return tmp_path


@pytest.fixture
def v1(tmp_path: Path) -> Path:
    write(tmp_path / "proc/self/cgroup", "8:pids:/\n4:memory:/outside/the/container\n1:cpu,cpuacct:/\n0::/\n")
    for controller in ("memory", "cpu", "pids"):
        (tmp_path / "sys/fs/cgroup" / controller).mkdir(parents=True)
    return tmp_path


def test_v2_moves_to_a_leaf_first_and_sets_limits(v2: Path):
    cgroups = open_cgroups(v2)
    assert cgroups is not None
    assert (cgroups.version, cgroups.unsupported) == (2, ())
    own = v2 / "sys/fs/cgroup/system.slice/agentd.service"
    assert (own / "agentd/cgroup.procs").read_text() == str(os.getpid())
    assert (own / "cgroup.subtree_control").read_text() == "+cpu +memory +pids"
    assert (own / "slmfleet/cgroup.subtree_control").read_text() == "+cpu +memory +pids"
    group = cgroups.create("worker-1", LIMITS)
    folder = own / "slmfleet/worker-1"
    assert group.enter == [folder / "cgroup.procs"]
    assert {f.name: f.read_text() for f in folder.iterdir()} == {
        "memory.max": "100000000",
        "memory.high": "95000000",
        "memory.oom.group": "1",
        "cpu.max": "150000 100000",
        "pids.max": "64",
    }
    write(folder / "memory.events", "low 0\noom 3\noom_kill 2\n")
    assert group.oom_kills() == 2


def test_v1_has_a_folder_in_each_hierarchy(v1: Path):
    cgroups = open_cgroups(v1)
    assert cgroups is not None
    assert cgroups.version == 1
    group = cgroups.create("worker-1", LIMITS)
    top = v1 / "sys/fs/cgroup"
    assert group.enter == [top / c / "slmfleet/worker-1/cgroup.procs" for c in ("memory", "cpu", "pids")]
    assert (top / "memory/slmfleet/worker-1/memory.limit_in_bytes").read_text() == "100000000"
    assert (top / "cpu/slmfleet/worker-1/cpu.cfs_quota_us").read_text() == "150000"
    assert (top / "pids/slmfleet/worker-1/pids.max").read_text() == "64"


def test_nothing_is_writable(tmp_path: Path):
    assert open_cgroups(tmp_path) is None


@pytest.mark.skipif(os.geteuid() != 0, reason="needs a second user")
def test_a_parent_that_an_agentd_of_another_user_made_is_not_ours(folder: Path):
    folder.chmod(0o755)
    write(folder / "proc/self/cgroup", "4:memory:/\n")
    (folder / "sys/fs/cgroup/memory/slmfleet").mkdir(parents=True, mode=0o755)
    assert open_cgroups(folder) is not None
    os.seteuid(65534)
    try:
        assert open_cgroups(folder) is None
    finally:
        os.seteuid(0)


def test_no_limit_writes_nothing(v2: Path):
    cgroups = open_cgroups(v2)
    assert cgroups is not None
    group = cgroups.create("worker-1", Limits())
    assert list(group.folders["memory"].iterdir()) == []
    group.remove()
    assert not group.folders["memory"].exists()


def meminfo(root: Path) -> None:
    write(root / "proc/meminfo", "MemTotal: 8000000 kB\nMemFree: 1 kB\nMemAvailable: 4000000 kB\n")


def test_available_is_not_free(tmp_path: Path):
    meminfo(tmp_path)
    assert read_memory(tmp_path) == Memory(8_000_000 * 1024, 4_000_000 * 1024)


@pytest.mark.parametrize(
    ("limit", "expected"), [("500000000", Memory(500 * MB, 300 * MB)), ("max", Memory(8_192_000_000, 4_096_000_000))]
)
def test_tightest_cgroup_counts(v2: Path, limit: str, expected: Memory):
    meminfo(v2)
    folder = v2 / "sys/fs/cgroup/system.slice"
    write(folder / "memory.max", limit)
    write(folder / "memory.current", "250000000")
    write(folder / "memory.stat", "anon 1\ninactive_file 50000000\n")
    assert read_memory(v2) == expected


def test_v1_limit_counts(v1: Path):
    meminfo(v1)
    folder = v1 / "sys/fs/cgroup/memory"
    write(folder / "memory.limit_in_bytes", "1000000000")
    write(folder / "memory.usage_in_bytes", "400000000")
    write(folder / "memory.stat", "total_inactive_file 100000000\n")
    assert read_memory(v1) == Memory(1000 * MB, 700 * MB)


def test_pressure(tmp_path: Path):
    assert stalled_fraction(tmp_path) == 0.0
    write(tmp_path / "proc/pressure/memory", "some avg10=12.50 avg60=1.00 avg300=0 total=9\nfull avg10=0 total=0\n")
    assert stalled_fraction(tmp_path) == 0.125


def test_v2_process_that_is_in_the_leaf_already_uses_the_same_parent(v2: Path):
    """An agentd that another one started, or that looks again: no leaf inside the leaf."""
    assert open_cgroups(v2) is not None
    own = v2 / "sys/fs/cgroup/system.slice/agentd.service"
    write(v2 / "proc/self/cgroup", "0::/system.slice/agentd.service/agentd\n")
    write(own / "agentd/cgroup.controllers", "cpu memory pids\n")
    again = open_cgroups(v2)
    assert again is not None
    assert again.create("worker-2", LIMITS).enter == [own / "slmfleet/worker-2/cgroup.procs"]
    assert not (own / "agentd/agentd").exists()


def test_pressure_of_a_group_counts_before_that_of_the_system(tmp_path: Path):
    group = tmp_path / "group"
    write(tmp_path / "proc/pressure/memory", "some avg10=50.00 avg60=0 avg300=0 total=0\n")
    assert stalled_fraction(tmp_path, group) == 0.5
    write(group / "memory.pressure", "some avg10=2.00 avg60=0 avg300=0 total=0\n")
    assert stalled_fraction(tmp_path, group) == 0.02


def test_sweep_leaves_the_groups_of_an_agentd_that_lives(v1: Path):
    """Another node on this machine may have made one a moment ago, and its worker is about to enter it."""
    cgroups = open_cgroups(v1)
    assert cgroups is not None
    parents = [v1 / "sys/fs/cgroup" / controller / "slmfleet" for controller in ("memory", "cpu", "pids")]
    for parent in parents:
        for name in ("worker-1-1", "worker-2-1", "worker-old", "other"):
            (parent / name).mkdir()
    cgroups.sweep("worker-", lambda pid: pid == 2)
    assert [sorted(f.name for f in parent.iterdir()) for parent in parents] == [["other", "worker-2-1"]] * 3
