"""How fast agentd passes chunks on from a worker: a stub runtime as fast as it can, beside a bare stream over HTTP.

An answer of so many pieces that neither side joins any: only events that carry text are counted, and each piece that
the runtime gave has its own. The time is that of whole requests.
"""

from __future__ import annotations

from bench import stats
from bench.report import Result
from bench.streams import Streams, both, commands

CHUNKS = 1000
# In one round.
REQUESTS = 20


def run(rounds: int = 21) -> Result:
    """Ratio of chunks a second."""
    ours: list[float] = []
    baseline: list[float] = []
    with both() as (agentd, bare):
        for streams in (agentd, bare):
            _rate(streams)
        for number in range(rounds):
            # Who goes first takes turns too.
            turns = [(agentd, ours), (bare, baseline)]
            for streams, figures in turns if number % 2 else reversed(turns):
                figures.append(_rate(streams))
    return Result(
        "relay-chunks",
        {"ratio": stats.ratio(ours, baseline)},
        ours,
        baseline,
        "chunks/s",
        stats.ratio_interval(ours, baseline),
        commands(),
        {"chunks": CHUNKS, "requests": REQUESTS},
    )


def _rate(streams: Streams) -> float:
    """Events with text a second."""
    seconds = 0.0
    for _ in range(REQUESTS):
        _, took, events = streams.ask(CHUNKS)
        assert events == CHUNKS, f"{events} events came for {CHUNKS} pieces"
        seconds += took
    return REQUESTS * CHUNKS / seconds
