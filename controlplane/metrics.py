"""What the control plane says of itself, in Prometheus' text format (version 0.0.4)."""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from starlette.types import Receive, Scope, Send

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


@dataclass(frozen=True, slots=True)
class Sample:
    """One line; ``labels`` are values of closed sets, never text from outside."""

    value: float
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Metric:
    """A family of samples. ``kind``: counter or gauge; the unit stands in the name."""

    name: str
    kind: str
    help: str
    samples: Iterable[Sample]


def render(metrics: Iterable[Metric]) -> str:
    """The exposition."""
    lines = []
    for metric in metrics:
        lines += [f"# HELP {metric.name} {metric.help}", f"# TYPE {metric.name} {metric.kind}"]
        for sample in metric.samples:
            labels = ",".join(f'{key}="{_escaped(value)}"' for key, value in sorted(sample.labels.items()))
            lines.append(f"{metric.name}{{{labels}}} {sample.value!r}" if labels else f"{metric.name} {sample.value!r}")
    return "\n".join(lines) + "\n"


def process_metrics() -> list[Metric]:
    """Processor time and memory of this process."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return [
        Metric(
            "process_cpu_seconds_total", "counter", "Processor time used.", [Sample(usage.ru_utime + usage.ru_stime)]
        ),
        Metric("process_resident_memory_bytes", "gauge", "Resident memory.", [Sample(_resident_bytes())]),
    ]


def _resident_bytes() -> int:
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize()
    except (OSError, IndexError, ValueError):
        return 0


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


class MetricsApp:
    """``GET /metrics``. No key: numbers of the whole, no names of nodes or models."""

    def __init__(self, parts: Sequence[Callable[[], str]]) -> None:
        """``parts``: each gives families in the text format, of names of its own."""
        self._parts = parts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        good = scope["method"] in ("GET", "HEAD")
        body = "".join(part() for part in self._parts).encode() if good else b"only GET\n"
        headers = [(b"content-type", CONTENT_TYPE.encode()), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200 if good else 405, "headers": headers})
        await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else body})
