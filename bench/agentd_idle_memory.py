"""What a node weighs while it does nothing: after the start, after work, and after the work's models were unloaded.

Weight is PSS (memory that is mapped by several processes counts in parts), summed over agentd and all its children. The
baseline waits beside it at the same time, so that what the two share is shared in both figures.
"""

from __future__ import annotations

import concurrent.futures
import sys

import httpx2

from bench import stats
from bench.fleet import Fleet, fleet, pss_bytes
from bench.models import deployment, stub_environment, stub_model
from bench.report import Result
from tests.support.processes import Child, wait_until

BASELINE = "import asyncio, ssl, sqlite3, signal; print('waiting', flush=True); signal.pause()"
NODE = "edge-1"
REQUESTS = 1000
AT_ONCE = 2
KEEP_ALIVE_S = 3


def run(rounds: int = 5) -> Result:
    """Ratio of the last of the three weights; the other two are told beside it."""
    start, busy, idle, baseline = [], [], [], []
    environment = {"AGENTD_KEEP_ALIVE": f"{KEEP_ALIVE_S}s", "AGENTD_TELEMETRY_INTERVAL": "5s"}
    with fleet({**stub_environment(), **environment}) as private:
        private.start_controlplane()
        private.start_node(NODE)
        private.apply(stub_model("stub", private.folder), deployment("stub", replicas=1, warm=0))
        private.await_ready("stub", 1)
        private.stop(NODE)
        for _ in range(rounds):
            with Child([sys.executable, "-c", BASELINE]) as bare:
                bare.wait_for_line("waiting")
                node = private.start_node(NODE)
                _await_settled(private)
                start.append(pss_bytes(node.pid))
                _work(private.local_api(NODE))
                busy.append(pss_bytes(node.pid))
                _await_alone(node)
                idle.append(pss_bytes(node.pid))
                baseline.append(pss_bytes(bare.pid))
                private.stop(NODE)
    return Result(
        "agentd-idle-memory",
        {"ratio": stats.ratio(idle, baseline)},
        idle,
        baseline,
        "bytes",
        stats.ratio_interval(idle, baseline),
        ["agentd run (gRPC session and MQTT connected)", f'python -c "{BASELINE}"'],
        {"after_start": start, "after_requests": busy, "requests": REQUESTS},
    )


def _await_settled(private: Fleet) -> None:
    """Session up, and MQTT too: the first row of telemetry of this start has come through."""
    private.await_online(NODE)
    known = {row["bootId"] + str(row["sequence"]) for row in private.client.items(f"/nodes/{NODE}/metrics", limit=1)}

    def newer() -> bool:
        rows = private.client.items(f"/nodes/{NODE}/metrics", limit=1)
        return any(row["bootId"] + str(row["sequence"]) not in known for row in rows)

    wait_until(newer, "telemetry comes through", 90)


def _await_alone(node: Child) -> None:
    wait_until(lambda: not node.descendants(), "everything idle was unloaded", 60)


def _work(api: str) -> None:
    body = {"model": "stub", "messages": [{"role": "user", "content": "Say something."}], "max_tokens": 16}
    with httpx2.Client(base_url=api, trust_env=False, timeout=60) as client:

        def one(number: int) -> None:
            response = client.post("/v1/chat/completions", json={**body, "stream": False})
            response.raise_for_status()

        with concurrent.futures.ThreadPoolExecutor(AT_ONCE, thread_name_prefix="asking") as pool:
            list(pool.map(one, range(REQUESTS)))
