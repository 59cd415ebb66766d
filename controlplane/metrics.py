"""What the control plane says of itself, in Prometheus' text format (version 0.0.4)."""

from __future__ import annotations

import ipaddress
import resource
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import sqlalchemy as sa
from starlette.datastructures import Headers
from starlette.types import Receive, Scope, Send

from controlplane.rest.auth import Authenticator, Unauthorized

# What proxies add (RFC 7239 and before it).
_FORWARDED = frozenset({b"forwarded", b"via", b"x-forwarded-for", b"x-real-ip"})
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
    """``GET /metrics``: without a key from this machine, else with one of any role, for it names what is deployed and
    tells how much it is used."""

    def __init__(self, parts: Sequence[Callable[[], str]], authenticator: Authenticator) -> None:
        """``parts``: each gives families in the text format, of names of its own."""
        self._parts = parts
        self._authenticator = authenticator

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        status, text = await self._answer(scope)
        body = text.encode()
        headers = [(b"content-type", CONTENT_TYPE.encode()), (b"content-length", str(len(body)).encode())]
        if status == 401:
            headers.append((b"www-authenticate", b"Bearer"))
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else body})

    async def _answer(self, scope: Scope) -> tuple[int, str]:
        if scope["method"] not in ("GET", "HEAD"):
            return 405, "only GET\n"
        if not is_local(scope):
            try:
                authorization = Headers(scope=scope).get("authorization")
                await self._authenticator.authenticate(authorization)
            except Unauthorized as error:
                return 401, f"{error}\n"
            except (OSError, TimeoutError, sa.exc.SQLAlchemyError):
                return 503, "keys can't be checked now: the control plane has no database\n"
        return 200, "".join(part() for part in self._parts)


def is_local(scope: Scope) -> bool:
    """Whether a request comes from this machine, and not through a proxy that says for whom it asks."""
    if any(name in _FORWARDED for name, _ in scope["headers"]):
        return False
    try:
        address = ipaddress.ip_address((scope.get("client") or ("",))[0])
    except ValueError:
        return False
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback
