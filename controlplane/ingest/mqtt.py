"""MQTT in: paho in its own thread, messages into a bounded queue of the event loop.

A message is acknowledged to the broker only when it was dealt with, and at most a window of them may be here at once:
a database that is slow or away makes the broker wait, not this process grow. MQTT 5 has a word for that window (Receive
Maximum, section 3.1.2.11.3), yet brokers break theirs (Mosquitto 2.0.11 sends thousands more to a slow reader), so
paho's thread also stops reading while the window is full. If that lasts longer than the keep-alive allows, the broker
closes the connection, and sends again what was unacknowledged when it opens anew.
"""

from __future__ import annotations

import asyncio
import ssl
import threading
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote, urlsplit

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from slmfleet import logs
from slmfleet.errors import UserError

log = logs.get(__name__)

WINDOW = 1000
KEEPALIVE_S = 60
# How often a reader that waits for room looks whether it shall end.
_LOOK_S = 0.2
# For as long as this the broker keeps what arrives while the link is down; nodes keep everything until it is committed.
SESSION_S = 300
FIRST_RETRY_S = 1
LAST_RETRY_S = 30


@dataclass(frozen=True, slots=True)
class MqttSettings:
    """How to reach the broker."""

    host: str
    port: int
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    tls: bool = False
    # PEM files: the authority of the broker's certificate (None: the system's and the fleet's), the fleet's authority,
    # our own certificate and its key.
    ca_file: Path | None = None
    cert_file: Path | None = None
    key_file: Path | None = None
    fleet_ca_file: Path | None = None

    @classmethod
    def from_url(
        cls, url: str, ca_file: Path | None = None, cert_file: Path | None = None, key_file: Path | None = None
    ) -> MqttSettings:
        """``mqtt[s]://[user:password@]host[:port]``; ports default to 1883 and 8883. Raises ValueError."""
        parts = urlsplit(url)
        if parts.scheme not in ("mqtt", "mqtts") or not parts.hostname or parts.path.strip("/") or parts.query:
            raise ValueError("not an MQTT URL: write mqtt://host:1883 or mqtts://user:password@host:8883")
        tls = parts.scheme == "mqtts"
        return cls(
            parts.hostname,
            parts.port or (8883 if tls else 1883),
            unquote(parts.username) if parts.username else None,
            unquote(parts.password) if parts.password else None,
            tls,
            ca_file,
            cert_file,
            key_file,
        )

    def context(self) -> ssl.SSLContext:
        """For TLS connections. Raises UserError when a file can't be read."""
        try:
            context = ssl.create_default_context(cafile=self.ca_file)
            if self.ca_file is None and self.fleet_ca_file is not None:
                context.load_verify_locations(self.fleet_ca_file)
            if self.cert_file is not None:
                context.load_cert_chain(self.cert_file, self.key_file)
        except (OSError, ssl.SSLError) as error:
            raise UserError(f"cannot use the files mqtt_ca_file, mqtt_cert_file, mqtt_key_file: {error}") from None
        return context


@dataclass(frozen=True, slots=True)
class Arrived:
    """A message as it came. ``link`` counts connections: packet ids mean nothing on another one."""

    topic: str
    payload: bytes
    packet_id: int
    qos: int
    link: int


class MqttSource:
    """The subscription. ``start`` and ``stop`` belong to the event loop that reads ``messages``."""

    def __init__(self, settings: MqttSettings, client_id: str, topics: tuple[str, ...], window: int = WINDOW) -> None:
        # Bounded by the window: each message holds a place in it until it is done.
        self.messages: asyncio.Queue[Arrived] = asyncio.Queue()
        self.connected = False
        # Messages of quality of service 0 that found the window full; nobody promised to deliver those.
        self.overflowed = 0
        self._settings = settings
        self._broker = f"{settings.host}:{settings.port}"
        self._topics = topics
        self._window = window
        self._room = threading.BoundedSemaphore(window)
        self._closing = threading.Event()
        self._link = 0
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._client = paho.Client(
            CallbackAPIVersion.VERSION2, client_id=client_id, protocol=paho.MQTTv5, manual_ack=True
        )
        if settings.username:
            self._client.username_pw_set(settings.username, settings.password)
        if settings.tls:
            self._client.tls_set_context(settings.context())
        self._client.reconnect_delay_set(FIRST_RETRY_S, LAST_RETRY_S)
        self._client.on_connect = self._on_connect
        self._client.on_connect_fail = lambda *_: log.warning("MQTT broker out of reach", broker=self._broker)
        self._client.on_disconnect = self._on_disconnect
        self._client.on_message = self._on_message

    def start(self) -> None:
        """Connect in the background, and again whenever the link breaks."""
        self._loop = asyncio.get_running_loop()
        properties = Properties(PacketTypes.CONNECT)
        properties.SessionExpiryInterval = SESSION_S
        properties.ReceiveMaximum = self._window
        self._client.connect_async(
            self._settings.host, self._settings.port, KEEPALIVE_S, clean_start=False, properties=properties
        )
        self._client.loop_start()

    def stop(self) -> None:
        """Leave the broker and end the thread. What is unacknowledged comes again next time."""
        self._closing.set()
        self._client.disconnect()
        self._client.loop_stop()

    def done(self, message: Arrived) -> None:
        """Acknowledge a message and free its place; one of an earlier connection comes again by itself."""
        self._room.release()
        with self._lock:
            if message.qos and message.link == self._link and self.connected:
                self._client.ack(message.packet_id, message.qos)

    def _on_connect(
        self, client: paho.Client, _userdata: object, _flags: object, reason: ReasonCode, _properties: object
    ) -> None:
        if reason.is_failure:
            log.error("MQTT broker refused the connection", reason=reason, broker=self._broker)
            return
        with self._lock:
            self._link += 1
            self.connected = True
        client.subscribe([(topic, 1) for topic in self._topics])
        log.info("MQTT broker connected", broker=self._broker)

    def _on_disconnect(
        self, _client: paho.Client, _userdata: object, _flags: object, reason: ReasonCode, _properties: object
    ) -> None:
        with self._lock:
            was, self.connected = self.connected, False
        if was and reason.is_failure:
            log.warning("MQTT broker lost", reason=reason, broker=self._broker)

    def _on_message(self, _client: paho.Client, _userdata: object, message: paho.MQTTMessage) -> None:
        if not self._place(message.qos):
            return
        arrived = Arrived(message.topic, bytes(message.payload), message.mid, message.qos, self._link)
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self.messages.put_nowait, arrived)

    def _place(self, qos: int) -> bool:
        """Wait for a place in the window; False when there is none for this message."""
        if qos == 0 and not self._room.acquire(blocking=False):
            self.overflowed += 1
            return False
        while qos and not self._room.acquire(timeout=_LOOK_S):
            if self._closing.is_set():
                return False
        return True
