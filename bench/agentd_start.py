"""How long a node takes from `agentd run` to serving: enrolled, its model on its disk, the control plane there."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

import httpx2

from bench.fleet import Fleet, fleet
from bench.models import deployment, stub_environment, stub_model
from bench.report import Result
from bench.stats import interval
from tests.support.processes import Child, free_port, wait_until

BASELINE = "import asyncio, ssl, sqlite3"
NODE = "edge-1"


def run(rounds: int = 11) -> Result:
    """Seconds to the first 200 of /readyz, beside the bare Python that any such daemon starts with."""
    ours, baseline = [], []
    with fleet(stub_environment()) as private:
        private.start_controlplane()
        private.start_node(NODE)
        private.apply(stub_model("stub", private.folder), deployment("stub", replicas=1, warm=0))
        private.await_ready("stub", 1)
        private.stop(NODE)
        for _ in range(rounds):
            ours.append(_seconds_to_ready(private))
            baseline.append(_seconds_of_python())
    return Result(
        "agentd-start",
        {"seconds": statistics.median(ours)},
        ours,
        baseline,
        "s",
        interval(ours, statistics.median),
        ["agentd run --state-dir DIR --api-listen 127.0.0.1:PORT", f'python -c "{BASELINE}"'],
    )


def _seconds_to_ready(private: Fleet) -> float:
    port = free_port()
    flags = ["--state-dir", str(private.state_dir(NODE)), "--api-listen", f"127.0.0.1:{port}"]
    with httpx2.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client:
        started = time.perf_counter()
        with Child([sys.executable, "-m", "agentd", "run", *flags], env=stub_environment()) as node:
            wait_until(lambda: _ready(client), "agentd is ready", 60)
            seconds = time.perf_counter() - started
            node.stop()
    return seconds


def _ready(client: httpx2.Client) -> bool:
    try:
        return client.get("/readyz").status_code == 200
    except httpx2.TransportError:
        return False


def _seconds_of_python() -> float:
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", BASELINE], check=True)
    return time.perf_counter() - started
