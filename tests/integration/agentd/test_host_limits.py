"""Real cgroups around real workers; skipped where this process may make none."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from agentd.device.cgroups import open_cgroups
from agentd.models.host import Host
from agentd.models.settings import BackoffSettings, HostSettings
from agentd.models.types import GenerationFailed, LoadableModel, Refused
from tests.support import stub_backend
from tests.support.hosts import answer, request, running, status_of
from tests.support.models import loadable

pytestmark = pytest.mark.model
MB = 10**6


@pytest.fixture
def cgroups() -> None:
    if open_cgroups() is None:
        pytest.skip("no cgroup is writable here (needs root, or systemd with Delegate=yes)")


def stub(folder: Path, name: str, **options: object) -> LoadableModel:
    return loadable(stub_backend.write_stub(folder / f"{name}.json", **options), "stub", name)


def settings(**more: object) -> HostSettings:
    return HostSettings(**{**stub_backend.host_options(), "backoff": BackoffSettings(0.2), **more})  # type: ignore[arg-type]


@pytest.mark.usefixtures("cgroups")
def test_worker_over_its_limit_is_killed_alone_and_named(tmp_path: Path):
    # The stub's estimate is 32 MB, whatever it takes.
    greedy, modest = stub(tmp_path, "greedy", memory_bytes=400 * MB), stub(tmp_path, "modest")

    async def scenario():
        async with running(Host(settings(memory_limit_factor=4.0)), [greedy, modest]) as host:
            await answer(host, request(modest.key))
            pid = status_of(host, modest.key).pid
            with pytest.raises(Refused, match=r"was killed by the kernel: it needed more than its limit of 128\.0 MB"):
                await answer(host, request(greedy.key))
            assert status_of(host, modest.key).pid == pid
            await answer(host, request(modest.key))

    asyncio.run(scenario())


def group_of(pid: int) -> Path:
    """The folder of the memory cgroup (v1) or the cgroup (v2) of a worker."""
    lines = [line.split(":", 2) for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines()]
    path = next(path for _, controllers, path in lines if controllers in ("memory", "") and "/slmfleet/worker-" in path)
    name = path.rpartition("/")[2]
    # The path may begin outside of this container: look for its end.
    return next(f for f in Path("/sys/fs/cgroup").rglob(f"slmfleet/{name}") if "cpu" not in f.parts)


@pytest.mark.usefixtures("cgroups")
def test_worker_is_in_its_group_from_the_start_and_the_group_goes(tmp_path: Path):
    model = stub(tmp_path, "m")

    async def scenario() -> Path:
        async with running(Host(settings(memory_limit_factor=8.0, worker_cpus=0.5, worker_pids=50)), [model]) as host:
            await host.load(model.key)
            pid = status_of(host, model.key).pid
            folder = group_of(pid)
            assert str(pid) in (folder / "cgroup.procs").read_text().split()
            return folder

    assert not asyncio.run(scenario()).exists()


@pytest.mark.parametrize("when", ["while it loads", "while it serves"])
def test_watchdog_ends_the_worker_that_takes_too_much_alone_and_names_it(tmp_path: Path, when: str):
    """Where no cgroup is writable. The stub's estimate is 32 MB, whatever it takes."""
    if when == "while it loads":
        greedy = stub(tmp_path, "greedy", memory_bytes=200 * MB, fail="late")
    else:
        greedy = stub(tmp_path, "greedy", memory_per_request=200 * MB, tokens_per_s=20)
    modest = stub(tmp_path, "modest", tokens_per_s=20)

    async def scenario():
        watched = settings(memory_limit_factor=4.0, watch_only=True)
        async with running(Host(watched), [greedy, modest]) as host:
            assert host.limits == "watchdog"
            await answer(host, request(modest.key))
            pid = status_of(host, modest.key).pid
            assert status_of(host, modest.key).limit_bytes // MB == 128
            with pytest.raises(
                (Refused, GenerationFailed), match=r"it took \d+\.\d MB, more than its limit of 128\.0 MB"
            ):
                await answer(host, request(greedy.key, max_tokens=1000))
            assert host.totals()[greedy.key].over_limit == 1
            assert status_of(host, modest.key).pid == pid
            await answer(host, request(modest.key))

    asyncio.run(scenario())


def oom_score(pid: str) -> int:
    return int(Path(f"/proc/{pid}/oom_score_adj").read_text())


def test_worker_goes_before_agentd_when_the_device_is_out_of_memory(tmp_path: Path):
    model = stub(tmp_path, "m")

    async def scenario():
        async with running(Host(settings()), [model]) as host:
            await host.load(model.key)
            pid = status_of(host, model.key).pid
            assert oom_score(str(pid)) > oom_score("self")

    asyncio.run(scenario())


def test_model_that_became_far_slower_is_told_until_it_recovers(tmp_path: Path):
    model = stub(tmp_path, "m")

    async def scenario():
        async def speed(tokens_per_s: int, tokens: int) -> str:
            await answer(host, request(model.key, f'{{"tokens_per_s": {tokens_per_s}}}', tokens))
            return status_of(host, model.key).thrashing

        async with running(Host(settings()), [model]) as host:
            assert await speed(200, 100) == ""
            assert "tokens/s instead of" in await speed(5, 10)
            assert "tokens/s instead of" in await speed(5, 10)
            assert host.totals()[model.key].thrashes == 1
            assert await speed(200, 100) == ""

    asyncio.run(scenario())
