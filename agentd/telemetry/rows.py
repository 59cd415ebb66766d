"""Rows of telemetry out of samples: pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from agentd.models.counters import Histogram, ModelCounters
from agentd.models.types import ModelKey, ModelStatus
from slmfleet.v1 import telemetry_pb2 as pb


def model_samples(statuses: Iterable[ModelStatus], counters: Mapping[ModelKey, ModelCounters]) -> list[pb.ModelSample]:
    """One sample per model that the host knows, or that was used since the last row."""
    known = {status.key: status for status in statuses}
    return [_sample(key, known.get(key), counters.get(key, ModelCounters())) for key in sorted({*known, *counters})]


def _sample(key: ModelKey, status: ModelStatus | None, counters: ModelCounters) -> pb.ModelSample:
    return pb.ModelSample(
        model=f"{key.model}@{key.version}",
        variant=key.variant,
        state=status.state.value if status else "gone",
        memory_bytes=status.memory_bytes if status else 0,
        requests_ok=counters.requests_ok,
        requests_failed=counters.requests_failed,
        requests_refused=counters.requests_refused,
        prompt_tokens=counters.prompt_tokens,
        output_tokens=counters.output_tokens,
        decode_seconds=counters.decode_seconds,
        first_token_s=_histogram(counters.first_token_s),
        total_s=_histogram(counters.total_s),
        queue_s=_histogram(counters.queue_s),
        loads=counters.loads,
        unloads=counters.unloads,
        crashes=counters.crashes,
    )


def _histogram(histogram: Histogram) -> pb.Histogram | None:
    if not any(histogram.counts):
        return None
    return pb.Histogram(bounds=histogram.bounds, counts=histogram.counts, sum=histogram.sum)
