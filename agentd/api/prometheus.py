"""``/metrics`` in Prometheus' text format 0.0.4, written by hand: a client library would only add memory.

Names and meanings stand in ``_HELP``; docs/api.md lists the same, which a test checks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from agentd.models.counters import Histogram, ModelCounters
from agentd.models.types import ModelKey, ModelState, ModelStatus
from slmfleet import __version__

_HELP: dict[str, tuple[str, str]] = {
    "agentd_info": ("gauge", "1, with the version as a label"),
    "agentd_uptime_seconds": ("gauge", "Seconds since agentd started, time in suspend included"),
    "agentd_memory_bytes": ("gauge", "Proportional memory (PSS) of agentd itself, without its workers"),
    "agentd_session_connected": ("gauge", "1 while the session to the control plane is up"),
    "agentd_session_attempts_total": ("counter", "Attempts to open the session"),
    "agentd_conflict": ("gauge", "1 while the node holds still because its history and the server's do not fit"),
    "agentd_desired_generation": ("gauge", "Generation of the stored desired state; 0 = none"),
    "agentd_assignments": ("gauge", "Assignments by condition that is true"),
    "agentd_outbox_rows": ("gauge", "Rows of telemetry and events that wait in no batch yet"),
    "agentd_outbox_batches": ("gauge", "Batches that are not yet known to be committed by the control plane"),
    "agentd_outbox_bytes": ("gauge", "Bytes of payload in the outbox"),
    "agentd_outbox_dropped_rows_total": ("counter", "Rows that were dropped for lack of space"),
    "agentd_requests_in_flight": ("gauge", "Requests that run or wait now"),
    "agentd_requests_total": ("counter", "Requests by model and outcome: ok, failed, refused, cancelled"),
    "agentd_refusals_total": ("counter", "Requests that were turned away, by model and reason (the error's code)"),
    "agentd_requests_running": ("gauge", "Requests that a model's worker serves now"),
    "agentd_queue_length": ("gauge", "Requests that wait for a model now"),
    "agentd_prompt_tokens_total": ("counter", "Prompt tokens of answered requests"),
    "agentd_cached_tokens_total": ("counter", "Prompt tokens that were found in the prefix cache"),
    "agentd_output_tokens_total": ("counter", "Tokens that were generated"),
    "agentd_prefill_seconds_total": ("counter", "Seconds spent reading prompts"),
    "agentd_decode_seconds_total": ("counter", "Seconds spent generating"),
    "agentd_first_token_seconds": ("histogram", "From a request's arrival to its first token"),
    "agentd_token_seconds": ("histogram", "Mean time of a generated token, one value for each answer"),
    "agentd_request_seconds": ("histogram", "From a request's arrival to its last token"),
    "agentd_queue_seconds": ("histogram", "Seconds that a request waited for its turn"),
    "agentd_model_loads_total": ("counter", "Times that a model was loaded"),
    "agentd_model_load_seconds": ("histogram", "From the decision to load a model to its readiness"),
    "agentd_model_unloads_total": ("counter", "Times that a model was unloaded"),
    "agentd_model_evictions_total": ("counter", "Unloads that made room for another model"),
    "agentd_model_thrashes_total": ("counter", "Times that a model was found far slower than it was"),
    "agentd_model_over_limit_total": ("counter", "Workers that were ended for taking more memory than they may"),
    "agentd_model_state": ("gauge", "1 for the state that a model is in"),
    "agentd_model_memory_bytes": ("gauge", "Memory of a model's worker"),
    "agentd_model_memory_limit_bytes": ("gauge", "What a model's worker may take; 0 = no limit, or no worker"),
    "agentd_model_crashes_total": ("counter", "Workers of a model that ended badly"),
}
METRIC_NAMES = tuple(_HELP)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What the page shows."""

    uptime_s: float
    memory_bytes: int
    connected: bool
    attempts: int
    conflict: bool
    generation: int
    conditions: Mapping[str, int]
    outbox_rows: int
    outbox_batches: int
    outbox_bytes: int
    outbox_dropped: int
    in_flight: int
    counts: Mapping[ModelKey, ModelCounters]
    models: Sequence[ModelStatus]


def render(snapshot: Snapshot) -> bytes:
    """The page."""
    page = _Page()
    page.add("agentd_info", 1, version=__version__)
    page.add("agentd_uptime_seconds", round(snapshot.uptime_s, 3))
    page.add("agentd_memory_bytes", snapshot.memory_bytes)
    page.add("agentd_session_connected", int(snapshot.connected))
    page.add("agentd_session_attempts_total", snapshot.attempts)
    page.add("agentd_conflict", int(snapshot.conflict))
    page.add("agentd_desired_generation", snapshot.generation)
    for condition, count in sorted(snapshot.conditions.items()):
        page.add("agentd_assignments", count, condition=condition)
    page.add("agentd_outbox_rows", snapshot.outbox_rows)
    page.add("agentd_outbox_batches", snapshot.outbox_batches)
    page.add("agentd_outbox_bytes", snapshot.outbox_bytes)
    page.add("agentd_outbox_dropped_rows_total", snapshot.outbox_dropped)
    page.add("agentd_requests_in_flight", snapshot.in_flight)
    for key, counts in sorted(snapshot.counts.items()):
        _add_counts(page, _labels(key), counts)
    for status in snapshot.models:
        labels = _labels(status.key)
        for state in ModelState:
            page.add("agentd_model_state", int(status.state == state), **labels, state=state.value)
        page.add("agentd_model_memory_bytes", status.memory_bytes, **labels)
        page.add("agentd_model_memory_limit_bytes", status.limit_bytes, **labels)
        page.add("agentd_requests_running", status.in_flight, **labels)
        page.add("agentd_queue_length", status.queued, **labels)
        page.add("agentd_model_crashes_total", status.crashes, **labels)
    return page.text().encode()


def _labels(key: ModelKey) -> dict[str, str]:
    return {"model": key.model, "version": key.version, "variant": key.variant}


def _add_counts(page: _Page, labels: dict[str, str], counts: ModelCounters) -> None:
    for outcome in ("ok", "failed", "refused", "cancelled"):
        page.add("agentd_requests_total", getattr(counts, f"requests_{outcome}"), **labels, outcome=outcome)
    for reason, count in sorted(counts.refusals.items()):
        page.add("agentd_refusals_total", count, **labels, reason=reason)
    page.add("agentd_prompt_tokens_total", counts.prompt_tokens, **labels)
    page.add("agentd_cached_tokens_total", counts.cached_tokens, **labels)
    page.add("agentd_output_tokens_total", counts.output_tokens, **labels)
    page.add("agentd_prefill_seconds_total", round(counts.prefill_seconds, 6), **labels)
    page.add("agentd_decode_seconds_total", round(counts.decode_seconds, 6), **labels)
    page.add_histogram("agentd_first_token_seconds", counts.first_token_s, labels)
    page.add_histogram("agentd_token_seconds", counts.token_s, labels)
    page.add_histogram("agentd_request_seconds", counts.total_s, labels)
    page.add_histogram("agentd_queue_seconds", counts.queue_s, labels)
    page.add("agentd_model_loads_total", counts.loads, **labels)
    page.add_histogram("agentd_model_load_seconds", counts.load_s, labels)
    page.add("agentd_model_unloads_total", counts.unloads, **labels)
    page.add("agentd_model_evictions_total", counts.evictions, **labels)
    page.add("agentd_model_thrashes_total", counts.thrashes, **labels)
    page.add("agentd_model_over_limit_total", counts.over_limit, **labels)


class _Page:
    """Samples grouped by name, each group under its HELP and TYPE lines."""

    def __init__(self) -> None:
        self._samples: dict[str, list[str]] = {}

    def add(self, metric: str, value: float, **labels: str) -> None:
        self._samples.setdefault(metric, []).append(f"{metric}{_braces(labels.items())} {value}")

    def add_histogram(self, metric: str, histogram: Histogram, labels: dict[str, str]) -> None:
        lines = self._samples.setdefault(metric, [])
        total = 0
        for edge, count in zip((*(f"{bound:g}" for bound in histogram.bounds), "+Inf"), histogram.counts, strict=True):
            total += count
            lines.append(f"{metric}_bucket{_braces([*labels.items(), ('le', edge)])} {total}")
        lines.append(f"{metric}_sum{_braces(labels.items())} {histogram.sum:.6f}")
        lines.append(f"{metric}_count{_braces(labels.items())} {total}")

    def text(self) -> str:
        lines = []
        for metric, samples in self._samples.items():
            kind, meaning = _HELP[metric]
            lines += [f"# HELP {metric} {meaning}", f"# TYPE {metric} {kind}", *samples]
        return "\n".join(lines) + "\n"


def _braces(labels: Iterable[tuple[str, str]]) -> str:
    inner = ",".join(f'{name}="{_escape(value)}"' for name, value in labels)
    return f"{{{inner}}}" if inner else ""


def _escape(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
