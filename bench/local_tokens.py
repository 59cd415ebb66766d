"""What the way through agentd costs: tokens a second of one stream, beside the same model driven in one process.

Both sides have the same file, threads, context and prompt, answer greedily (so the same tokens come), and are measured
from the call to the last token. They stay loaded and take turns; the other one is idle meanwhile.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2

from agentd.models.settings import default_threads
from agentd.models.worker.environment import TRAPS
from bench import stats
from bench.fleet import Fleet, fleet
from bench.models import deployment, real_model
from bench.report import Result
from fleetctl.ask import chunks

NODE = "edge-1"
CONTEXT_TOKENS = 2048
TOKENS = 128
PROMPT = "Write a long story about a lighthouse keeper who finds a map."
DIRECT = Path(__file__).with_name("direct.py")


def run(rounds: int = 21) -> Result:
    """Ratio of tokens a second, ours by direct."""
    ours: list[float] = []
    baseline: list[float] = []
    model = real_model()
    name = model["metadata"]["name"]
    body = {
        "model": name,
        "messages": [{"role": "user", "content": PROMPT}],
        "max_tokens": TOKENS,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    with fleet() as private:
        private.start_controlplane()
        private.start_node(NODE)
        private.apply(model, deployment(name, replicas=1, warm=1))
        private.await_ready(name, 1, warm=True)
        with _direct(_weights(private, model), body) as direct:
            _ours(private, body)  # once, not counted: both sides begin with a warm prefix cache
            next(direct)
            for number in range(rounds):
                # Who goes first takes turns too: what the machine does meanwhile then favours nobody.
                first, second = (ours, baseline) if number % 2 else (baseline, ours)
                for figures in (first, second):
                    figures.append(_ours(private, body) if figures is ours else next(direct))
    return Result(
        "local-tokens",
        {"ratio": stats.ratio(ours, baseline)},
        ours,
        baseline,
        "tokens/s",
        stats.ratio_interval(ours, baseline),
        [
            "POST /v1/chat/completions of agentd, stream",
            f"python bench/direct.py FILE {CONTEXT_TOKENS} {default_threads()}",
        ],
        {"tokens": TOKENS, "threads": default_threads()},
    )


def _weights(private: Fleet, model: dict) -> Path:
    digest = model["spec"]["variants"][0]["files"][0]["sha256"]
    return private.state_dir(NODE) / "artifacts" / "blobs" / digest


def _ours(private: Fleet, body: dict) -> float:
    url = f"{private.local_api(NODE)}/v1/chat/completions"
    with httpx2.Client(trust_env=False, timeout=120) as client:
        started = time.perf_counter()
        with client.stream("POST", url, json=body) as response:
            response.raise_for_status()
            tokens = 0
            for chunk in chunks(response.iter_lines()):
                tokens = (chunk.get("usage") or {}).get("completion_tokens", tokens)
            seconds = time.perf_counter() - started
    assert tokens == TOKENS, f"the answer has {tokens} tokens, not {TOKENS}: the rounds cannot be compared"
    return tokens / seconds


@contextmanager
def _direct(weights: Path, body: dict) -> Iterator[Iterator[float]]:
    """Tokens a second of the model driven in a process of its own; one generation each time one is asked for."""
    command = [sys.executable, str(DIRECT), str(weights), str(CONTEXT_TOKENS), str(default_threads())]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        env={**os.environ, **TRAPS},
    )  # fmt: skip
    asking, answering = process.stdin, process.stdout
    assert asking is not None
    assert answering is not None

    def figures() -> Iterator[float]:
        while True:
            asking.write(json.dumps(body) + "\n")
            asking.flush()
            answer = json.loads(answering.readline())
            assert answer["tokens"] == TOKENS, f"the direct answer has {answer['tokens']} tokens, not {TOKENS}"
            yield answer["tokens"] / answer["seconds"]

    try:
        yield figures()
    finally:
        process.kill()
        process.wait()
