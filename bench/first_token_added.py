"""What agentd adds before the first token: a stub runtime takes no time, so all of it is agentd's, HTTP's and ours."""

from __future__ import annotations

from bench import stats
from bench.report import Result
from bench.streams import both, commands

REQUESTS = 100
TOKENS = 4


def run(rounds: int = 15) -> Result:
    """Percentiles of the time from the request to its first event, over all requests of all rounds.

    Nothing is taken off: the figure holds the client's and HTTP's share too, which the baseline shows.
    """
    ours: list[float] = []
    baseline: list[float] = []
    with both() as (agentd, bare):
        for streams in (agentd, bare):
            streams.ask(TOKENS)
        for number in range(rounds):
            # Who goes first takes turns too.
            turns = [(agentd, ours), (bare, baseline)]
            for streams, figures in turns if number % 2 else reversed(turns):
                figures += [streams.ask(TOKENS)[0] * 1000 for _ in range(REQUESTS)]
    return Result(
        "first-token-added",
        {"p50_ms": stats.percentile(ours, 0.5), "p99_ms": stats.percentile(ours, 0.99)},
        _thinned(ours, rounds),
        _thinned(baseline, rounds),
        "ms",
        stats.interval(ours, lambda values: stats.percentile(values, 0.5)),
        commands(),
        {"requests": len(ours), "baseline_p50_ms": stats.percentile(baseline, 0.5),
         "baseline_p99_ms": stats.percentile(baseline, 0.99)},
    )  # fmt: skip


def _thinned(values: list[float], rounds: int) -> list[float]:
    """The median of each round."""
    size = len(values) // rounds
    return [stats.percentile(values[at : at + size], 0.5) for at in range(0, len(values), size)]
