"""The gRPC servers that nodes call: enrolment on a port of its own (server TLS), session and relay (mutual TLS)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import grpc
from sqlalchemy.ext.asyncio import AsyncEngine

from controlplane.db.engine import Hints
from controlplane.listening import Address, first_of
from controlplane.node_api.distributor import Distributor
from controlplane.node_api.enrollment import EnrollmentService
from controlplane.node_api.links import NodeLinks
from controlplane.node_api.pki import Pki
from controlplane.node_api.recorder import Recorder
from controlplane.node_api.relay import RelayService
from controlplane.node_api.session import SessionPolicy, SessionService
from slmfleet import logs
from slmfleet.errors import UserError
from slmfleet.v1 import enrollment_pb2, enrollment_pb2_grpc, relay_pb2_grpc, session_pb2, session_pb2_grpc

log = logs.get(__name__)

# How long open streams may take to end when the control plane stops.
_GRACE_S = 3.0
_MAX_SESSION_MESSAGE = 16 * 1024 * 1024
_MAX_ENROLLMENT_MESSAGE = 256 * 1024
# Calls that may be under way; most of them wait for one of the few connections to Postgres.
_ENROLLMENTS_AT_ONCE = 512


@dataclass(frozen=True, slots=True)
class Addresses:
    """Where to listen: for each server the first (host, port) that can be had, port 0 = any free one."""

    enrollment: Sequence[Address]
    node_api: Sequence[Address]


@dataclass(frozen=True, slots=True)
class BoundPorts:
    """The ports that were taken."""

    enrollment: int
    node_api: int


class NodeApi:
    """Enrolment, sessions and relays of this control-plane process.

    ``await start()`` binds and serves; ``await run()`` (which starts too, if need be) goes on until cancelled, then
    ends all streams in order. ``links`` reaches the nodes that are connected here.
    """

    def __init__(
        self,
        engine: AsyncEngine,
        hints: Hints,
        pki: Pki,
        replica_id: str,
        *,
        addresses: Addresses,
        endpoints: Callable[[BoundPorts], enrollment_pb2.Endpoints],
        mqtt: Callable[[str, str], session_pb2.MqttEndpoint | None] = lambda _node_id, _password: None,
        policy: SessionPolicy | None = None,
        certificate_days: float = 30.0,
    ) -> None:
        """``endpoints(ports)`` and ``mqtt(node_id, password)``: what nodes are told to connect to (None: no MQTT);
        ``password`` is ``nodes.mqtt_password``, a random one that was made when the node enrolled."""
        self._engine = engine
        self._pki = pki
        self._replica_id = replica_id
        self._addresses = addresses
        self._policy = policy or SessionPolicy()
        self._endpoints = enrollment_pb2.Endpoints()
        self._make_endpoints = endpoints
        self.links = NodeLinks()
        self._recorder = Recorder(engine, self._on_superseded)
        self._distributor = Distributor(engine, hints, self.links, self._recorder)
        self._enrollment = EnrollmentService(engine, pki, lambda: self._endpoints, certificate_days=certificate_days)
        self._session = SessionService(
            engine,
            self.links,
            self._recorder,
            replica_id,
            self._policy,
            lambda: self._endpoints,
            mqtt,
            self._distributor.look,
        )
        self._relay = RelayService(engine, self.links)
        self._servers: list[grpc.aio.Server] = []
        self.ports: BoundPorts | None = None

    async def start(self) -> BoundPorts:
        """Bind both ports and serve. Raises UserError when an address can't be had."""
        key, chain = self._pki.server_key_pem, self._pki.server_chain_pem
        enrollment = grpc.aio.server(
            options=[*_common_options(), ("grpc.max_receive_message_length", _MAX_ENROLLMENT_MESSAGE)],
            maximum_concurrent_rpcs=_ENROLLMENTS_AT_ONCE,
        )
        enrollment_pb2_grpc.add_EnrollmentServicer_to_server(self._enrollment, enrollment)
        node_api = grpc.aio.server(options=[*_common_options(), *self._session_options()])
        session_pb2_grpc.add_NodeSessionServicer_to_server(self._session, node_api)
        relay_pb2_grpc.add_RelayServicer_to_server(self._relay, node_api)
        server_tls = grpc.ssl_server_credentials([(key, chain)])
        mutual_tls = grpc.ssl_server_credentials([(key, chain)], self._pki.ca_pem, require_client_auth=True)
        self.ports = BoundPorts(
            enrollment=first_of(
                self._addresses.enrollment, lambda at: _bind(enrollment, at, server_tls, "enrollment_listen")
            ),
            node_api=first_of(self._addresses.node_api, lambda at: _bind(node_api, at, mutual_tls, "node_listen")),
        )
        self._endpoints = self._make_endpoints(self.ports)
        for server in (enrollment, node_api):
            await server.start()
            self._servers.append(server)
        log.info("node services listen", enrollment=self.ports.enrollment, node_api=self.ports.node_api)
        return self.ports

    async def run(self) -> None:
        """Serve until cancelled."""
        if not self._servers:
            await self.start()
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._recorder.run(), name="session-recorder")
                group.create_task(self._distributor.run(), name="session-distributor")
        finally:
            await self._stop()

    async def _stop(self) -> None:
        """No new calls, last words to every node, then what they said into the database.

        The rows of open sessions stay open: the end of a control plane is no fact about its nodes, and the liveness
        rules know a dead owner from a closed stream.
        """
        self.links.close("the control plane stops")
        await asyncio.gather(*(server.stop(_GRACE_S) for server in self._servers))
        self._servers.clear()
        try:
            async with asyncio.timeout(_GRACE_S):
                await self._recorder.flush()
        except Exception as error:  # noqa: BLE001 - the process ends, whatever the database does
            log.warning("cannot write what nodes said last", error=error)

    def _session_options(self) -> list[tuple[str, int]]:
        """HTTP/2 pings find a peer that is gone without a word: after about two TTLs its streams are closed."""
        beat_ms, ttl_ms = int(self._policy.beat_s * 1000), int(self._policy.ttl_s * 1000)
        return [
            ("grpc.max_receive_message_length", _MAX_SESSION_MESSAGE),
            ("grpc.keepalive_time_ms", max(1000, beat_ms)),
            ("grpc.keepalive_timeout_ms", max(1000, 2 * ttl_ms - beat_ms)),
        ]

    def _on_superseded(self, node_id: str, epoch: int) -> None:
        session = self.links.session(node_id)
        if session is not None and session.epoch == epoch:
            # Deleted or taken over: the distributor knows which, and the session must not stay either way.
            self._distributor.look(node_id)


def _common_options() -> list[tuple[str, int]]:
    return [
        # With reuse, a second control plane would silently share the port.
        ("grpc.so_reuseport", 0),
        # Nodes may ping as often as each second, also while they have nothing to say.
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", 1000),
        ("grpc.http2.max_ping_strikes", 0),
    ]


def _bind(server: grpc.aio.Server, address: Address, tls: grpc.ServerCredentials, key: str) -> int:
    host, port = address
    where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    try:
        bound = server.add_secure_port(where, tls)
    except RuntimeError:
        bound = 0
    if not bound:
        raise UserError(f"cannot listen on {where}: it is in use or no address of this machine; set another {key}")
    return int(bound)
