"""The steps of the demo. Each does one thing with real programs, waits until it really happened, and says so."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from programs import Ensemble, Program, StepFailed
from telling import Story, short

from fleetctl import manifests
from fleetctl.ask import Answer, ask
from fleetctl.client import Client
from fleetctl.columns import replica_state
from fleetctl.errors import Problem, Unreachable
from fleetctl.writing import apply_documents
from slmfleet.units import format_size

FLEET = Path(__file__).with_name("fleet.yaml")
NODES = {
    "edge-1": "tier=demo,site=lyon",
    "edge-2": "tier=demo,site=turin",
    "edge-3": "tier=demo,site=geneva",
}
MODEL = "smollm2-135m"
AGENT = "geographer"
QUESTIONS = ("What is the capital of France?", "What is the capital of Italy?")


@dataclass
class Demo:
    """What the steps hand to each other."""

    data_dir: Path
    story: Story
    programs: Ensemble
    answers: list[Answer] = field(default_factory=list)
    pids: dict[str, int] = field(default_factory=dict)
    # Names of the programs whose end was told, or was this program's own doing.
    known_dead: set[str] = field(default_factory=set)
    _client: Client | None = None
    _runtime: dict[str, Any] = field(default_factory=dict)

    @property
    def client(self) -> Client:
        assert self._client is not None, "step 1 makes it"
        return self._client

    @property
    def controlplane(self) -> Program:
        return self.programs.programs["controlplane"]

    def state_dir(self, node: str) -> Path:
        return self.data_dir / "nodes" / node

    # --- 1 ------------------------------------------------------------------------------------------------------------

    def start_controlplane(self) -> None:
        """`controlplane dev`: PostgreSQL, the broker, REST, the gateway and gRPC, on ports that are free."""
        program = self.programs.start("controlplane", ["controlplane", "dev", "--data-dir", self.data_dir])
        self._runtime = self._wait_for_runtime(program, self.data_dir)
        token = (self.data_dir / "admin.token").read_text().strip()
        self._client = Client(_url(self._runtime["http"]), token)
        self.programs.wait(self._answers_info, "the control plane did not answer", 30, [program])
        self.story.done("PostgreSQL, MQTT broker, REST, OpenAI gateway and gRPC are up")
        self.story.line(f"  {self.client.server}", "dim")
        for change in self._runtime.get("changes", ()):
            self.story.line(f"  {change}", "dim")

    def _wait_for_runtime(self, program: Program, folder: Path) -> dict[str, Any]:
        def read() -> dict[str, Any] | None:
            try:
                runtime: dict[str, Any] = json.loads((folder / "runtime.json").read_text())
            except (OSError, ValueError):
                return None
            return runtime if runtime.get("pid") == program.pid else None  # else: left by one that was killed

        found = self.programs.wait(read, f"{program.name} did not come up", 60, [program])
        assert found is not None
        return found

    def _answers_info(self) -> bool:
        try:
            return bool(self.client.get("/info"))
        except Unreachable:
            return False

    # --- 2 ------------------------------------------------------------------------------------------------------------

    def fetch_model(self) -> None:
        """Register the model and wait until the control plane has its verified file."""
        [document] = [item for item in manifests.read([str(FLEET)]) if item.kind == "Model"]
        apply_documents(self.client, [document])
        with self.story.bars() as bars:

            def ready() -> dict[str, Any] | None:
                status = self.client.get(f"/models/{MODEL}").get("status", {})
                done, total = status.get("bytesDone") or 0, status.get("bytesTotal") or 0
                bars.show(
                    MODEL, done, total, f"{format_size(done)} of {format_size(total)}" if total else "looking it up"
                )
                if status.get("phase") == "failed":
                    raise StepFailed(f"the model could not be fetched: {status.get('message')}", self.controlplane)
                return status if status.get("phase") == "ready" else None

            status = self.programs.wait(ready, "the model was not fetched", 900, [self.controlplane])
        assert status is not None
        size = format_size(status.get("bytesTotal") or 0)
        self.story.done(f"{document.value['spec']['description'].split(',')[0]}, {size}, SHA-256 verified")

    # --- 3 ------------------------------------------------------------------------------------------------------------

    def start_nodes(self) -> None:
        """Three agentd, each enrolled (once) with a token of its own and a key that never leaves its folder."""
        for node, labels in NODES.items():
            if self._is_enrolled(node):
                self.story.done(f"{node} is enrolled since an earlier start")
            else:
                self._enroll(node, labels)
                self.story.done(f"{node} is enrolled: a token in, a certificate out ({labels})")
        for node in NODES:
            arguments = ["agentd", "run", "--state-dir", self.state_dir(node), "--api-listen", "127.0.0.1:0"]
            # The control plane had to take another port if somebody else has its old one now.
            self.programs.start(node, [*arguments, "--node-api", self._runtime["node_api"]])
        programs = [self.programs.programs[node] for node in NODES]
        for node, program in zip(NODES, programs, strict=True):
            self._wait_for_runtime(program, self.state_dir(node))
        self.programs.wait(self._all_online, "not all nodes came online", 60, [*programs, self.controlplane])
        self.story.done("three nodes are online, over mutual TLS")

    def _is_enrolled(self, node: str) -> bool:
        identity = self.state_dir(node) / "identity" / "node.json"
        return identity.exists() and self.client.find(f"/nodes/{node}") is not None

    def _enroll(self, node: str, labels: str) -> None:
        # Half of an identity is left when one of the two folders was deleted: neither side knows the other's half.
        shutil.rmtree(self.state_dir(node), ignore_errors=True)
        if self.client.find(f"/nodes/{node}") is not None:
            self.client.call("DELETE", f"/nodes/{node}")
        token = self.client.call("POST", "/enrollment-tokens", body={"ttlSeconds": 300, "uses": 1})["token"]
        self.state_dir(node).mkdir(parents=True, exist_ok=True)
        # Not on the command line: every user of the machine can read that.
        file = self.state_dir(node) / "enrollment.token"
        file.touch(mode=0o600)
        file.write_text(token)
        arguments = ["agentd", "enroll", "--state-dir", self.state_dir(node), "--server", self._runtime["enrollment"]]
        arguments += ["--token-file", file, "--name", node, "--labels", labels]
        try:
            self.programs.run(f"{node}-enroll", arguments)
        finally:
            file.unlink(missing_ok=True)

    def _online(self) -> set[str]:
        nodes = self.client.items("/nodes")
        return {node["metadata"]["name"] for node in nodes if node["status"].get("state") == "online"}

    def _all_online(self) -> bool:
        return set(NODES) <= self._online()

    # --- 4 ------------------------------------------------------------------------------------------------------------

    def apply_fleet(self) -> None:
        """Apply fleet.yaml: a model, an agent and a deployment with two replicas."""
        for result in apply_documents(self.client, manifests.read([str(FLEET)])):
            self.story.done(f"{result['kind'].lower()}/{result['name']} {result['action']}")

    # --- 5 ------------------------------------------------------------------------------------------------------------

    def await_replicas(self) -> None:
        """Wait, with a bar for each, until two replicas are ready and have the model loaded."""
        names = self._await_ready(lambda ready: len(ready) == 2, "two replicas did not become ready", 180)
        self.story.done(f"ready on {' and '.join(sorted(names))}")

    def _await_ready(self, enough: Callable[[set[str]], bool], otherwise: str, timeout_s: float) -> set[str]:
        """Names of the online nodes that have the model loaded, once they are ``enough``."""
        replicas: list[dict[str, Any]] = []
        with self.story.bars() as bars:

            def look() -> set[str]:
                replicas[:] = self.client.items(f"/deployments/{AGENT}/replicas")
                online = self._online()
                bars.keep({str(replica["node"]) for replica in replicas})
                for replica in replicas:
                    _show(bars.show, replica, replica["node"] in online)
                ready = {str(item["node"]) for item in replicas if item.get("ready") and item.get("warm")} & online
                return ready if enough(ready) else set()

            try:
                return self.programs.wait(look, otherwise, timeout_s, [self.controlplane])
            except StepFailed as error:
                raise StepFailed(f"{error}; {_why(replicas)}", error.program) from None

    def ask(self, question: str) -> Answer:
        """Ask the agent through the gateway; the answer streams to the terminal."""
        self.story.question(question)
        answer = ask(self.client, AGENT, [{"role": "user", "content": question}], self.story.piece)
        self.story.figures(answer.summary())
        if not answer.text.strip() or answer.node not in NODES:
            raise StepFailed(f"the answer is empty or names no node of the demo ({answer.node!r})", self.controlplane)
        self.answers.append(answer)
        self.pids |= self.programs.pids()
        return answer

    # --- 6 ------------------------------------------------------------------------------------------------------------

    def kill_and_ask_again(self) -> None:
        """SIGKILL to the node that answered; the other replica answers, and the third node takes over."""
        dead = self.answers[-1].node
        victim = self.programs.programs[dead]
        killed = time.monotonic()
        victim.kill()
        self.known_dead.add(dead)
        self.story.line(f"SIGKILL to {dead} (pid {victim.pid})", "red")
        try:
            answer = self.ask(QUESTIONS[1])
        except (Problem, Unreachable) as error:
            raise StepFailed(f"after the death of {dead} nobody answered: {error}", self.controlplane) from None
        asked = time.monotonic() - killed - answer.total_s
        self._time("failover_first_token", asked + answer.first_token_s)
        self._time("failover_answer", asked + answer.total_s)
        if answer.node == dead:
            raise StepFailed(f"{dead} is dead and yet named as the one that answered", self.controlplane)
        self.story.done(f"{answer.node} answered {self.story.seconds['failover_first_token']:.2f} s after the kill")
        [third] = set(NODES) - {dead, answer.node}
        self._await_ready(lambda ready: {answer.node, third} <= ready, f"{third} did not take over", 120)
        self._time("replacement", time.monotonic() - killed)
        self.story.done(f"{third} has taken over, ready {self.story.seconds['replacement']:.1f} s after the kill")
        self.pids |= self.programs.pids()

    def _time(self, key: str, seconds: float) -> None:
        self.story.seconds[key] = round(seconds, 3)

    # --- 7 ------------------------------------------------------------------------------------------------------------

    def show_urls(self) -> None:
        """Where everything is."""
        base = self.client.server
        pairs = [("API docs", f"{base}/docs"), ("gateway", f"{base}/v1")]
        pairs += [(f"{node} local API", self._local_api(node)) for node in NODES]
        where = "" if self.data_dir == default_data_dir() else f"--data-dir {short(self.data_dir)} "
        pairs += [("try", f".venv/bin/fleetctl {where}get nodes"), ("", f'.venv/bin/fleetctl {where}ask {AGENT} "..."')]
        pairs.append(("key", f"{short(self.data_dir)}/admin.token"))
        self.story.pairs(pairs)

    def tell_deaths(self) -> None:
        """Say which nodes ended by themselves since the last call; raises StepFailed when the control plane did."""
        for program in self.programs.ended():
            if program.name in self.known_dead:
                continue
            self.known_dead.add(program.name)
            if program is self.controlplane:
                raise StepFailed(f"the control plane {program.how_it_ended()}, so the fleet is stopped", program)
            self.story.line(f"{program.name} {program.how_it_ended()}; its replicas move to another node.", "red")
            self.story.log(program.tail(), program.log)

    def _local_api(self, node: str) -> str:
        if self.programs.programs[node].exit_code() is not None:
            return "does not run; starts again with the next demo"
        return _url(str(json.loads((self.state_dir(node) / "runtime.json").read_text())["api"])) + "/v1"

    def result(self) -> dict[str, Any]:
        """What `--once` prints as its last line."""
        return {
            "answers": [answer.text for answer in self.answers],
            "nodes": [answer.node for answer in self.answers],
            "pids": self.pids,
            "seconds": self.story.seconds,
        }


def default_data_dir() -> Path:
    """The folder of `controlplane dev`."""
    data = os.environ.get("XDG_DATA_HOME") or "~/.local/share"
    return Path(data).expanduser() / "slmfleet" / "dev"


def _url(address: str) -> str:
    return (address if "://" in address else f"http://{address}").rstrip("/")


def _why(replicas: list[dict[str, Any]]) -> str:
    """What the replicas say of themselves, for somebody who wonders why nothing goes on."""
    said = []
    for replica in replicas:
        bad = [item["message"] for item in replica.get("conditions") or () if item.get("type") == "Degraded"]
        said.append(f"{replica['node']} is {replica_state(replica)}{': ' + '; '.join(bad) if any(bad) else ''}")
    return ", ".join(said) or "no replica was placed"


def _show(show: Callable[[str, float, float, str], None], replica: Mapping[str, Any], online: bool) -> None:
    done, total = replica.get("bytesDone") or 0, replica.get("bytesTotal") or 0
    state = replica_state(replica)
    if not online:
        state, done, total = "silent; replaced after 5 TTLs", 0, 1
    elif state == "ready":
        state, done, total = "ready, loading the model", 1, 1
    elif state == "warm":
        state, done, total = "ready, loaded", 1, 1
    show(str(replica["node"]), done, total, state)
