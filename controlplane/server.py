"""The composition root: makes the parts of the control plane, connects them, runs them, stops them in order."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy.ext.asyncio import AsyncEngine

from controlplane import datafolder, keys
from controlplane.artifacts.server import ArtifactServer
from controlplane.artifacts.store import BlobStore
from controlplane.broker_access import with_certificate
from controlplane.config import Config
from controlplane.controllers.manager import Controllers
from controlplane.db.engine import Hints, make_engine
from controlplane.domain.liveness import LivenessPolicy
from controlplane.embedded.dev import Embedded
from controlplane.gateway.app import GatewayPolicy, build_gateway
from controlplane.ingest.ingest import Ingest
from controlplane.ingest.mqtt import MqttSettings
from controlplane.listening import Address, first_of
from controlplane.metrics import MetricsApp
from controlplane.node_api.pki import Pki
from controlplane.node_api.server import Addresses, BoundPorts, NodeApi
from controlplane.node_api.session import SessionPolicy
from controlplane.rest.app import build_rest
from controlplane.rest.auth import Authenticator
from controlplane.rest.context import ServerInfo
from controlplane.services import Service, run_services, stop_on_signals
from controlplane.telling import Numbers, Where, greeting, join
from controlplane.web import ByPrefix, HttpServer
from slmfleet.systemd import Notifier
from slmfleet.v1 import enrollment_pb2, session_pb2

POOL_SIZE = 20
# Patience beyond stop_timeout for what each part does at its end.
STOP_MARGIN_S = 5.0


@dataclass(frozen=True)
class Ground:
    """What stands before the event loop runs; see ``controlplane.launch``."""

    config: Config
    postgres_url: str
    # Whether the database is this data folder's own.
    own_database: bool
    # Bound and listening.
    http: socket.socket
    # Addresses to listen on, by option: the first that can be had; port 0 takes a free one.
    listen: Mapping[str, Sequence[Address]]
    mqtt: MqttSettings
    # What a node is told of the broker, from its id and its stored password.
    node_mqtt: Callable[[str, str], session_pb2.MqttEndpoint]
    embedded: Embedded
    # Host name or address by which nodes reach this server.
    advertise: str
    # Prints lines for the person who started this.
    say: Callable[[Sequence[str]], None]


@dataclass(frozen=True)
class Parts:
    """Everything that runs, connected, with its ports taken."""

    where: Where
    token_file: Path | None
    services: Sequence[Service]


async def run(ground: Ground) -> None:
    """Run the control plane until SIGINT or SIGTERM. Raises UserError, or an ExceptionGroup when a part failed."""
    stop = asyncio.Event()
    stop_on_signals(stop)
    folder = ground.config.data_dir
    notifier = Notifier()
    engine = make_engine(ground.postgres_url, POOL_SIZE)
    try:
        parts = await assemble(ground, engine)

        def started() -> None:
            datafolder.remember_ports(folder, parts.where.ports)
            told = {"children": ground.embedded.pids, "changes": ground.embedded.changes}
            datafolder.write_runtime(folder, {"pid": os.getpid(), **told, **parts.where.facts})
            ground.say(greeting(parts.where, parts.token_file, ground.embedded))
            notifier.ready()

        watchdog = Service("watchdog", lambda: _feed(notifier))
        await run_services([*parts.services, watchdog], started, stop)
    finally:
        notifier.stopping()
        datafolder.remove_runtime(folder)
        await engine.dispose()


async def assemble(ground: Ground, engine: AsyncEngine) -> Parts:
    """Make the parts and take the ports, in this order: what a node may reach stands before it is let in."""
    config, folder, listen = ground.config, ground.config.data_dir, ground.listen
    replica_id = datafolder.replica_id(folder)
    hints = Hints(engine)
    pki = Pki.open(folder / "pki", [ground.advertise, socket.gethostname()])
    blobs = BlobStore(folder / "blobs")
    await asyncio.to_thread(blobs.prepare)
    policy = LivenessPolicy(beat_s=config.beat, beats_per_ttl=config.ttl_beats)
    controllers = Controllers(engine, hints, replica_id, policy, blobs, ca_pem=[pki.ca_pem.decode()])
    await controllers.prepare()
    token_file = await keys.ensure_admin(engine, folder, own_database=ground.own_database)

    pem = {name: pki.folder / f"{name}.pem" for name in ("server", "ca")}
    artifacts = ArtifactServer(
        blobs, engine, *listen["artifacts_listen"][0], pem["server"], pki.folder / "server.key", pem["ca"]
    )
    artifacts_port = first_of(listen["artifacts_listen"], artifacts.bind)
    node_api = NodeApi(
        engine,
        hints,
        pki,
        replica_id,
        addresses=Addresses(listen["enrollment_listen"], listen["node_listen"]),
        endpoints=lambda ports: _endpoints(ground.advertise, ports, artifacts_port),
        mqtt=ground.node_mqtt,
        policy=SessionPolicy(beat_s=config.beat, ttl_s=config.ttl_s),
        certificate_days=config.certificate_days,
    )
    ports = await node_api.start()
    where = Where(
        http=_reachable(*ground.http.getsockname()[:2]),
        enrollment=join(ground.advertise, ports.enrollment),
        node_api=join(ground.advertise, ports.node_api),
        artifacts=join(ground.advertise, artifacts_port),
        mqtt=join(ground.mqtt.host, ground.mqtt.port),
    )

    authenticator = Authenticator(engine)
    gateway = build_gateway(engine, hints, node_api.links, authenticator, GatewayPolicy(silent_s=config.ttl_s))
    ingest = Ingest(engine, with_certificate(ground.mqtt, pki), node_api.links, f"slmfleet-{replica_id}")
    rest = build_rest(
        engine,
        authenticator=authenticator,
        blobs=blobs,
        ca_fingerprint=pki.ca_fingerprint,
        info=ServerInfo(config.beat, config.ttl_s, where.endpoints, f"http://{where.http}/v1"),
    )
    numbers = Numbers(node_api.links, controllers, ingest)
    app = ByPrefix(rest, {"/v1": gateway, "/metrics": MetricsApp([numbers.text, gateway.metrics_text], authenticator)})
    return Parts(
        where,
        token_file,
        [
            Service("embedded-servers", ground.embedded.watch),
            Service("hints", hints.run),
            Service("controllers", controllers.run),
            Service("artifacts", artifacts.run),
            Service("node-api", node_api.run),
            Service("gateway", gateway.run),
            Service("ingest", ingest.run),
            Service("http", HttpServer(app, ground.http, config.stop_timeout).run, config.stop_timeout + STOP_MARGIN_S),
        ],
    )


def _endpoints(advertise: str, ports: BoundPorts, artifacts_port: int) -> enrollment_pb2.Endpoints:
    return enrollment_pb2.Endpoints(
        node_api=join(advertise, ports.node_api),
        enrollment=join(advertise, ports.enrollment),
        artifacts=f"https://{join(advertise, artifacts_port)}",
    )


def _reachable(host: str, port: int) -> str:
    """An address to call from this machine, of a socket that listens there (which may be on all addresses)."""
    return join({"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host), port)


async def _feed(notifier: Notifier) -> None:
    """Tell systemd that the event loop turns, three times as often as it wants to know."""
    while True:
        notifier.alive()
        await asyncio.sleep((notifier.watchdog_s or 3600.0) / 3)
