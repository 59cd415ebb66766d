"""How long a client waits when the node that serves it is killed: from SIGKILL to the first byte of the next successful
answer through the gateway, the client asking again at once.

Stub workers: what is measured is the fleet, not a model. Nodes that were killed start again in the background; a kill
waits until there are two others that are ready.
"""

from __future__ import annotations

import statistics
import time

import httpx2

from bench import stats
from bench.fleet import Fleet, fleet
from bench.models import deployment, stub_environment, stub_model
from bench.report import Result
from tests.support.processes import wait_until

NODES = tuple(f"edge-{number}" for number in range(1, 5))
MODEL = "stub"
BODY = {
    "model": MODEL,
    "messages": [{"role": "user", "content": "Say something."}],
    "max_tokens": 8,
    "stream": True,
}


def run(rounds: int = 200) -> Result:
    """99th percentile over the kills; the baseline is the same request with nobody killed."""
    ours, baseline, attempts = [], [], []
    with fleet(stub_environment()) as private:
        private.start_controlplane()
        for node in NODES:
            private.start_node(node)
        private.apply(stub_model(MODEL, private.folder), deployment(MODEL, mode="every_node", onDisconnect="keep"))
        private.await_ready(MODEL, len(NODES), warm=True)
        with httpx2.Client(base_url=private.client.server, headers=private.client.headers, trust_env=False) as http:
            for _ in range(rounds):
                quiet_s, node = _first_byte(http)
                baseline.append(quiet_s)
                seconds, tries = _kill_and_ask(private, http, node)
                ours.append(seconds)
                attempts.append(tries)
                private.start_node(node, wait=False)
                _await_others(private, node)
    return Result(
        "failover-killed",
        {"p99_s": stats.percentile(ours, 0.99), "p50_s": statistics.median(ours), "max_s": max(ours)},
        ours,
        baseline,
        "s",
        stats.interval(ours, lambda values: stats.percentile(values, 0.99)),
        [
            "kill -KILL <agentd that answered last>",
            "POST /v1/chat/completions of the gateway, stream, until it answers",
        ],
        {"kills": len(ours), "asked_again": sum(count - 1 for count in attempts)},
    )


def _first_byte(http: httpx2.Client) -> tuple[float, str]:
    """Seconds to the first byte of an answer that is a success to its end, and who gave it."""
    started = time.perf_counter()
    with http.stream("POST", "/v1/chat/completions", json=BODY, timeout=30) as response:
        response.raise_for_status()
        pieces = response.iter_raw()
        next(pieces)
        seconds = time.perf_counter() - started
        rest = b"".join(pieces)
        if b"[DONE]" not in rest:
            raise httpx2.RemoteProtocolError("the answer broke off")
        return seconds, response.headers["x-slmfleet-node"]


def _kill_and_ask(private: Fleet, http: httpx2.Client, node: str) -> tuple[float, int]:
    killed = time.perf_counter()
    private.kill(node)
    tries = 0
    while True:
        tries += 1
        asked = time.perf_counter()
        try:
            seconds, answered = _first_byte(http)
        except (httpx2.HTTPStatusError, httpx2.TransportError):
            assert time.perf_counter() - killed < 60, f"nobody answered within a minute of the death of {node}"
            continue
        assert answered != node, f"{node} is dead and yet named as the one that answered"
        private.bury(node)
        return asked - killed + seconds, tries


def _await_others(private: Fleet, dead: str) -> None:
    """At least two nodes besides the last victim are ready and loaded: enough for the next kill to be survived."""

    def enough() -> bool:
        return len(private.await_ready(MODEL, 2, warm=True) - {dead}) >= 2 and private.is_online(dead)

    wait_until(enough, "the nodes are back", 60)
