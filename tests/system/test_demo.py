"""The whole demo with real processes and the real model: what a newcomer runs first, and nothing left behind."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
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

    home: Path
    folder: Path
    killed: set[str] = field(default_factory=set)


@pytest.fixture(scope="module")
def state() -> Iterator[State]:
    """One fleet over all tests of this module: each starts what the one before ended.

    Not in pytest's own temporary folder: a parallel pytest closes that to the user that PostgreSQL runs as under root.
    It lies where the demo would have it in a home folder, so that the README can be followed to the letter.
    """
    with tempfile.TemporaryDirectory(prefix="slmfleet-demo-") as home:
        yield State(Path(home), Path(home) / ".local/share/slmfleet/dev")


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


class Newcomer:
    """Follows "Your first own agent" of the README to the letter, in a folder of their own."""

    def __init__(self, home: Path, folder: Path) -> None:
        section = (ROOT / "README.md").read_text().split("## Your first own agent")[1].split("\n## ")[0]
        self.blocks = {
            language: textwrap.dedent(text)
            for language, text in re.findall(r"```(yaml|python)\n(.*?)```", section, re.DOTALL)
        }
        self.commands = [shlex.split(found) for found in re.findall(r"`\.venv/bin/(fleetctl [^`]+)`", section)]
        self._folder = folder
        self._environment = {"HOME": str(home), "PATH": os.environ["PATH"]}

    def run(self, program: str, *arguments: str) -> str:
        """Standard output of a program of this environment."""
        argv = [Path(sys.executable).with_name(program), *arguments]
        done = subprocess.run(
            argv, cwd=self._folder, env=self._environment, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0, f"{arguments}: {done.stdout}{done.stderr}"
        return done.stdout

    def make_an_agent(self) -> list[str]:
        """What each command printed, and at last what the Python of the page did."""
        (self._folder / "colours.yaml").write_text(self.blocks["yaml"])
        *before, ask = self.commands
        said = [self.run(*command) for command in before]
        wait_until(self._is_ready, "colours is ready", 60)
        return [*said, self.run(*ask), self.run("python", "-c", self.blocks["python"])]

    def _is_ready(self) -> bool:
        found = json.loads(self.run("fleetctl", "get", "deployment", "colours", "-o", "json"))
        return bool(found["status"]["ready"])


def test_it_stays_up_until_ctrl_c_and_a_newcomer_makes_an_agent_meanwhile(state: State, tmp_path: Path) -> None:
    with Child([sys.executable, DEMO, "--data-dir", state.folder], cwd=ROOT) as demo:
        watch = Watch(demo)
        demo.wait_for_line("Ctrl-C ends everything", DEMO_S)
        state.killed |= set(re.findall(r"SIGKILL to (\S+)", demo.output))
        assert re.search(r"http://127\.0\.0\.1:\d+/docs", demo.output)
        with Child([sys.executable, DEMO, "--data-dir", state.folder], cwd=ROOT) as second:
            assert second.wait_for_exit(30) == 1
            assert "another demo runs" in second.output
        planned, applied, explained, answer, by_openai = Newcomer(state.home, tmp_path).make_an_agent()
        assert "deployment/colours created (dry run)" in planned
        assert "deployment/colours created" in applied
        assert "edge-" in explained
        assert answer.strip()
        assert by_openai.strip() == answer.strip()
        demo.send(signal.SIGINT)
        assert demo.wait_for_exit(60) == 0, demo.output
    assert_nothing_left(watch, state)


def test_deaths_are_told_at_once_and_only_that_of_the_control_plane_ends_it(state: State) -> None:
    with Child([sys.executable, DEMO, "--data-dir", state.folder], cwd=ROOT) as demo:
        watch = Watch(demo)
        demo.wait_for_line("Ctrl-C ends everything", DEMO_S)
        killed = set(re.findall(r"SIGKILL to (\S+)", demo.output))
        # Those of this run: over all runs it may have been each of them once.
        living = min({"edge-1", "edge-2", "edge-3"} - killed)
        state.killed |= killed
        os.kill(pid_in(state.folder / "nodes" / living), signal.SIGKILL)
        demo.wait_for_line(rf"^ *{living} was killed by SIGKILL", 2)
        demo.wait_for_line(rf"The whole log: .*/{living}\.log", 2)
        assert demo.process.poll() is None, "a fleet goes on without one node"
        # A control plane that dies like that tidies nothing up; the next one does.
        state.killed |= {living, state.folder.name}
        os.kill(pid_in(state.folder), signal.SIGKILL)
        demo.wait_for_line("^error: the control plane was killed by SIGKILL", 2)
        assert demo.wait_for_exit(60) == 1, demo.output
        told = demo.output
        assert told.index("The whole log: ", told.index("error: ")) < told.index("Everything is stopped")
        assert "had to be killed" not in told
    assert_nothing_left(watch, state)


def pid_in(folder: Path) -> int:
    return int(json.loads((folder / "runtime.json").read_text())["pid"])


def test_a_failing_program_is_told_with_the_end_of_its_log(tmp_path: Path) -> None:
    (tmp_path / "admin.token").mkdir(parents=True)  # where a file must go
    with Child([sys.executable, DEMO, "--once", "--data-dir", tmp_path], cwd=ROOT) as demo:
        assert demo.wait_for_exit(90) == 1, demo.output
        assert re.search(r"^error: controlplane ended with exit code \d", demo.output, re.MULTILINE)
        assert f"The whole log: {tmp_path}/logs/controlplane.log" in demo.output
