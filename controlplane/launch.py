"""What stands before the event loop runs: the data folder, the embedded servers, the schema, the addresses.

``dev`` and ``serve`` differ here and nowhere else; ``controlplane.server`` gets a ``Ground`` and does not know which.
"""

from __future__ import annotations

import asyncio
import socket
import sys
from collections.abc import Mapping, Sequence
from urllib.parse import urlsplit

from controlplane import datafolder
from controlplane.config import LISTENERS, SERVED, Config
from controlplane.db import migrate
from controlplane.embedded.broker import HOST as BROKER_HOST
from controlplane.embedded.broker import EmbeddedBroker
from controlplane.embedded.dev import Embedded, running
from controlplane.ingest.mqtt import MqttSettings
from controlplane.listening import Address, bind, first_of
from controlplane.server import Ground, run
from slmfleet import logs
from slmfleet.v1 import session_pb2

log = logs.get(__name__)


def dev(config: Config, explicit: frozenset[str]) -> None:
    """``controlplane dev``, until a signal ends it. ``explicit``: the options that somebody set on purpose."""
    folder = config.data_dir
    with datafolder.hold(folder):
        datafolder.remove_runtime(folder)
        refuse_taken(config, explicit)
        last = datafolder.last_ports(folder)
        listen = {name: addresses(name, config, explicit, last) for name in LISTENERS}
        with running(
            folder, postgres=not config.postgres_url, broker=not config.mqtt_url, broker_at=listen["mqtt_listen"]
        ) as embedded:
            url = embedded.postgres.url() if embedded.postgres else config.postgres_url
            migrate.upgrade(url)
            _start(config, url, listen, embedded)


def serve(config: Config) -> None:
    """``controlplane serve``, until a signal ends it."""
    with datafolder.hold(config.data_dir):
        datafolder.remove_runtime(config.data_dir)
        migrate.check(config.postgres_url)
        _start(config, config.postgres_url, {name: [getattr(config, name)] for name in SERVED}, Embedded())


def refuse_taken(config: Config, explicit: frozenset[str]) -> None:
    """Raises UserError when an address that somebody gave can't be had: before a database is started for nothing."""
    for name in LISTENERS:
        if name in explicit:
            bind(getattr(config, name), name).close()


def addresses(name: str, config: Config, explicit: frozenset[str], last: Mapping[str, int]) -> list[Address]:
    """Where ``dev`` may listen, best first: as somebody said and nowhere else; or on the port of the last run (nodes
    look for it there), the usual one, any free one (0)."""
    host, port = getattr(config, name)
    if name in explicit:
        return [(host, port)]
    return [(host, known) for known in dict.fromkeys((last.get(name), port, 0)) if known is not None]


def _start(config: Config, url: str, listen: Mapping[str, Sequence[Address]], embedded: Embedded) -> None:
    ground = Ground(
        config=config,
        postgres_url=url,
        own_database=embedded.postgres is not None,
        http=first_of(listen["http_listen"], lambda address: bind(address, "http_listen")),
        listen=listen,
        mqtt=_server_mqtt(config, embedded.broker),
        node_mqtt=_NodeMqtt(config, embedded.broker),
        embedded=embedded,
        advertise=config.advertise or socket.getfqdn(),
        say=_say,
    )
    with ground.http:
        asyncio.run(run(ground))


def _say(lines: Sequence[str]) -> None:
    print("\n".join(lines), flush=True, file=sys.stdout)


def _server_mqtt(config: Config, broker: EmbeddedBroker | None) -> MqttSettings:
    if broker is None:
        return MqttSettings.from_url(config.mqtt_url, config.mqtt_ca_file, config.mqtt_cert_file, config.mqtt_key_file)
    username, password = broker.credentials_of_server()
    return MqttSettings(BROKER_HOST, broker.port, username, password)


class _NodeMqtt:
    """What a node is told of the broker, and what people are."""

    def __init__(self, config: Config, broker: EmbeddedBroker | None) -> None:
        self._broker = broker
        self._given = MqttSettings.from_url(config.mqtt_node_url or config.mqtt_url) if broker is None else None
        # The login in mqtt_url is the control plane's own; the one in mqtt_node_url is there to be told.
        self._shared_login = bool(config.mqtt_node_url and urlsplit(config.mqtt_node_url).username)

    def __call__(self, node_id: str, password: str) -> session_pb2.MqttEndpoint:
        if self._broker is not None:
            username, password = self._broker.credentials_of_node(node_id)
            return session_pb2.MqttEndpoint(
                host=BROKER_HOST, port=self._broker.port, username=username, password=password
            )
        given = self._given
        assert given is not None
        username = node_id
        if self._shared_login:
            username, password = given.username or "", given.password or ""
        return session_pb2.MqttEndpoint(
            host=given.host, port=given.port, username=username, password=password, tls=given.tls
        )
