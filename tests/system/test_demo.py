"""The whole demo with real processes and the real model: what a newcomer runs first, and nothing left behind."""

from __future__ import annotations

import contextlib
import fcntl
import json
import re
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support.processes import Child, accepts, assert_gone, wait_until

pytestmark = [pytest.mark.system, pytest.mark.model, pytest.mark.timeout(400)]
ROOT = Path(__file__).parents[2]
DEMO = ROOT / "deploy" / "demo" / "demo.py"
DEMO_S = 300.0


@dataclass
class State:
    """The folder of one fleet, and the nodes that were killed in it: they alone could not tidy up."""

    folder: Path
    killed: set[str] = field(default_factory=set)


@pytest.fixture(scope="module")
def state() -> Iterator[State]:
    """One fleet over all tests of this module: each starts what the one before ended.

    Not in pytest's own temporary folder: a parallel pytest closes that to the user that PostgreSQL runs as under root.
    """
    with tempfile.TemporaryDirectory(prefix="slmfleet-demo-") as folder:
        yield State(Path(folder) / "state")


class Watch:
    """Every process that the demo ever had, seen from outside, and the ports that they listened on."""

    def __init__(self, demo: Child) -> None:
        self._demo = demo
        self._ended = threading.Event()
        self.processes: dict[int, psutil.Process] = {}
        self.ports: set[tuple[str, int]] = set()
        self._thread = threading.Thread(target=self._look, name="watch of the demo", daemon=True)
        self._thread.start()

    def _look(self) -> None:
        while not self._ended.wait(0.25):
            for process in self._demo.descendants():
                self.processes[process.pid] = process
                try:
                    sockets = process.net_connections("tcp")
                except psutil.Error:
                    continue
                self.ports |= {(s.laddr.ip, s.laddr.port) for s in sockets if s.status == psutil.CONN_LISTEN}

    def stop(self) -> None:
        self._ended.set()
        self._thread.join()


def assert_nothing_left(watch: Watch, state: State) -> None:
    """No process, no port, no lock, no note of running programs."""
    watch.stop()
    assert_gone(list(watch.processes.values()), deadline_s=2.0)
    loopback = {("127.0.0.1" if ip in ("0.0.0.0", "::", "127.0.0.1") else ip, port) for ip, port in watch.ports}
    assert len(loopback) >= 4, "the control plane listens on several ports: the watch saw too little to judge"
    assert not [address for address in loopback if accepts(*address)]
    notes = {path.parent.name for path in state.folder.rglob("runtime.json")}
    assert notes <= state.killed
    locks = [*state.folder.rglob("*.lock"), *state.folder.rglob("lock")]
    assert locks, "the control plane and the nodes hold locks while they run: none was found"
    for lock in locks:
        with lock.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def run_once(state: State) -> tuple[dict[str, Any], str, Watch]:
    with Child([sys.executable, DEMO, "--once", "--data-dir", state.folder], cwd=ROOT) as demo:
        watch = Watch(demo)
        status = demo.wait_for_exit(DEMO_S)
        assert status == 0, demo.output
        result = json.loads(demo.lines[-1])
        state.killed |= {result["nodes"][0]}
        return result, demo.output, watch


def assert_story(result: dict[str, Any], output: str) -> None:
    """Two answers with sense in them, from two nodes, one of which was killed, and a third that took over."""
    first, second = result["answers"]
    assert "Paris" in first
    assert "Rome" in second
    killed, survivor = result["nodes"]
    assert {killed, survivor} < {"edge-1", "edge-2", "edge-3"}
    assert killed != survivor
    [third] = {"edge-1", "edge-2", "edge-3"} - {killed, survivor}
    assert re.search(rf"SIGKILL to {killed}", output)
    assert re.search(rf"{third} has taken over", output)
    assert first in output, "the answer is shown as it comes"
    seconds = result["seconds"]
    assert 0 < seconds["failover_first_token"] <= seconds["failover_answer"] < seconds["replacement"] < 60
    assert {"controlplane", "model", "nodes", "apply", "replicas", "stop", "total"} <= set(seconds)
    assert {"controlplane", "edge-1", "edge-2", "edge-3"} <= set(result["pids"])


def test_the_whole_demo_answers_survives_a_kill_and_leaves_nothing(state: State) -> None:
    result, output, watch = run_once(state)
    assert_story(result, output)
    assert set(result["pids"].values()) <= set(watch.processes)
    assert_nothing_left(watch, state)


def test_a_second_start_finds_the_fleet_again_though_its_ports_are_taken(state: State) -> None:
    nodes = state.folder / "nodes"
    if not nodes.exists():
        pytest.skip("runs after the first start of the demo")
    before = {path.parent.parent.name: path.read_bytes() for path in nodes.glob("*/identity/client.pem")}
    with contextlib.ExitStack() as others:
        ports = json.loads((state.folder / "ports.json").read_text()).values()
        for port in ports:
            others.enter_context(socket.create_server(("127.0.0.1", port)))
        result, output, watch = run_once(state)
    assert_story(result, output)
    assert output.count("is enrolled since an earlier start") == 3
    assert "smollm2-135m unchanged" in output
    after = {path.parent.parent.name: path.read_bytes() for path in nodes.glob("*/identity/client.pem")}
    assert before == after
    assert result["seconds"]["model"] < 10, "the model was fetched again"
    assert_nothing_left(watch, state)


@pytest.mark.parametrize("moment", [r"enrolled", r"ready on"])
def test_ctrl_c_midway_ends_everything_in_order(state: State, moment: str) -> None:
    with Child([sys.executable, DEMO, "--data-dir", state.folder], cwd=ROOT) as demo:
        watch = Watch(demo)
        demo.wait_for_line(moment, DEMO_S)
        wait_until(lambda: len(watch.ports) >= 4, "the watch has seen the ports")
        demo.send(signal.SIGINT)
        assert demo.wait_for_exit(60) == 130, demo.output
        assert "Everything is stopped" in demo.output
        assert "had to be killed" not in demo.output
    assert_nothing_left(watch, state)


def test_it_stays_up_until_ctrl_c_and_a_second_one_is_refused_meanwhile(state: State) -> None:
    with Child([sys.executable, DEMO, "--data-dir", state.folder], cwd=ROOT) as demo:
        watch = Watch(demo)
        demo.wait_for_line("Ctrl-C ends everything", DEMO_S)
        assert re.search(r"http://127\.0\.0\.1:\d+/docs", demo.output)
        with Child([sys.executable, DEMO, "--data-dir", state.folder], cwd=ROOT) as second:
            assert second.wait_for_exit(30) == 1
            assert "another demo runs" in second.output
        state.killed |= set(re.findall(r"SIGKILL to (\S+)", demo.output))
        demo.send(signal.SIGINT)
        assert demo.wait_for_exit(60) == 0, demo.output
    assert_nothing_left(watch, state)


def test_a_failing_program_is_told_with_the_end_of_its_log(tmp_path: Path) -> None:
    (tmp_path / "admin.token").mkdir(parents=True)  # where a file must go
    with Child([sys.executable, DEMO, "--once", "--data-dir", tmp_path], cwd=ROOT) as demo:
        assert demo.wait_for_exit(90) == 1, demo.output
        assert re.search(r"^error: controlplane ended with exit code \d", demo.output, re.MULTILINE)
        assert f"The whole log: {tmp_path}/logs/controlplane.log" in demo.output
