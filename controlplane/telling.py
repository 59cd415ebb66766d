"""What the control plane says of itself: where it listens, when it has started, its numbers for Prometheus."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import slmfleet
from controlplane.controllers.manager import Controllers
from controlplane.embedded.dev import Embedded
from controlplane.ingest.ingest import Ingest
from controlplane.metrics import Metric, Sample, process_metrics, render
from controlplane.node_api.links import NodeLinks


def join(host: str, port: int) -> str:
    """``host:port``, an IPv6 address in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


@dataclass(frozen=True, slots=True)
class Where:
    """Addresses of this control plane as others call it, host:port."""

    http: str
    enrollment: str
    node_api: str
    artifacts: str
    mqtt: str

    @property
    def facts(self) -> dict[str, str]:
        """For runtime.json."""
        return asdict(self)

    @property
    def endpoints(self) -> dict[str, str]:
        """For ``GET /api/v1/info``."""
        return {name: address for name, address in self.facts.items() if name != "http"}

    @property
    def ports(self) -> dict[str, int]:
        """By the option that sets them: for the next start."""
        options = {
            "http_listen": self.http,
            "enrollment_listen": self.enrollment,
            "node_listen": self.node_api,
            "artifacts_listen": self.artifacts,
            "mqtt_listen": self.mqtt,
        }
        return {option: int(address.rpartition(":")[2]) for option, address in options.items()}


def greeting(where: Where, token_file: Path | None, embedded: Embedded) -> list[str]:
    """Lines for the person who started the program."""
    lines = [
        f"slmfleet control plane {slmfleet.__version__}",
        f"  API and docs   http://{where.http}/docs",
        f"  gateway        http://{where.http}/v1   (OpenAI protocol)",
        f"  enrolment      {where.enrollment}   (TLS)",
        f"  nodes          {where.node_api}   (mutual TLS)",
        f"  model files    {where.artifacts}   (mutual TLS)",
        f"  MQTT           {where.mqtt}",
    ]
    if token_file is not None:
        lines.append(f"  admin key      in {token_file}")
    if embedded.broker is not None:
        lines.append(
            "The embedded MQTT broker knows passwords and no certificates: it listens on loopback alone. "
            "For nodes elsewhere use a broker of your own (--mqtt-url)."
        )
    return [*lines, *embedded.changes]


class Numbers:
    """This process's own numbers; the gateway has a page of its own."""

    def __init__(self, links: NodeLinks, controllers: Controllers, ingest: Ingest) -> None:
        self._links = links
        self._controllers = controllers
        self._ingest = ingest
        self._started = time.time()

    def text(self) -> str:
        """In Prometheus' text format."""
        return render([*self._own(), *self._telemetry(), *self._loops(), *process_metrics()])

    def _own(self) -> list[Metric]:
        version = {"version": slmfleet.__version__}
        connected = len(self._links.connected())
        return [
            Metric("slmfleet_controlplane_info", "gauge", "Constant 1; the version is a label.", [Sample(1, version)]),
            Metric("slmfleet_controlplane_start_time_seconds", "gauge", "Unix time.", [Sample(self._started)]),
            Metric("slmfleet_nodes_connected", "gauge", "Nodes with a session or relay here.", [Sample(connected)]),
        ]

    def _telemetry(self) -> list[Metric]:
        counters = self._ingest.counters
        prefix = "slmfleet_ingest"
        totals: Mapping[str, tuple[str, float]] = {
            "batches": ("Batches stored.", counters.batches),
            "repeated_batches": ("Batches that were stored before.", counters.repeated),
            "rows": ("Rows stored.", counters.rows),
            "bytes": ("Bytes of messages.", counters.bytes),
            "dropped_rows": ("Rows that nodes gave up for lack of space.", counters.dropped_rows),
            "retries": ("Transactions that were tried again.", counters.retries),
            "overflowed": ("Messages without acknowledgement that found no room.", self._ingest.overflowed),
        }
        bad = [Sample(count, {"reason": reason}) for reason, count in sorted(counters.bad.items())]
        return [
            *(
                Metric(f"{prefix}_{name}_total", "counter", text, [Sample(value)])
                for name, (text, value) in totals.items()
            ),
            Metric(f"{prefix}_refused_total", "counter", "Messages that were no good.", bad),
            Metric(f"{prefix}_waiting", "gauge", "Messages that wait.", [Sample(self._ingest.waiting)]),
            Metric(
                f"{prefix}_connected", "gauge", "Whether the broker is there.", [Sample(int(self._ingest.connected))]
            ),
        ]

    def _loops(self) -> list[Metric]:
        counters = self._controllers.counters
        prefix = "slmfleet_controller"
        return [
            Metric(
                f"{prefix}_{name}", kind, text,
                [Sample(getattr(value, field), {"controller": controller}) for controller, value in counters.items()],
            )
            for name, kind, text, field in (
                ("passes_total", "counter", "Passes of each controller.", "passes"),
                ("failures_total", "counter", "Passes that failed.", "failures"),
                ("last_pass_seconds", "gauge", "How long the last pass took.", "last_pass_s"),
            )
        ]  # fmt: skip
