"""One MQTT connection with paho-mqtt: MQTT 5, QoS 1, presence with a last will.

paho runs its own thread; what it tells comes back to the event loop by ``call_soon_threadsafe``. It keeps little: the
outbox is the queue, and what is unacknowledged by the control plane is published again from there.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import paho.mqtt.client as mqtt
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode, MQTTProtocolVersion

from slmfleet import logs
from slmfleet.v1 import telemetry_pb2 as pb

log = logs.get(__name__)

KEEP_ALIVE_S = 30
MAX_QUEUED = 128
RECONNECT_MAX_S = 30


@dataclass(frozen=True, slots=True, repr=False)
class Endpoint:
    """Where the broker is and who we are there."""

    host: str
    port: int
    username: str
    password: str
    tls: bool


class Broker:
    """A connection that keeps itself up. ``changed`` is called on the event loop when it came up or went down."""

    def __init__(
        self,
        endpoint: Endpoint,
        node_id: str,
        presence: Callable[[bool], pb.Presence],
        context: Callable[[], ssl.SSLContext],
        changed: Callable[[bool], None],
    ) -> None:
        self._endpoint = endpoint
        self._prefix = f"slmfleet/v1/{node_id}"
        self._presence = presence
        self._changed = changed
        self._loop = asyncio.get_running_loop()
        self.connected = False
        client = mqtt.Client(
            CallbackAPIVersion.VERSION2, client_id=f"agentd-{node_id}", protocol=MQTTProtocolVersion.MQTTv5
        )
        client.username_pw_set(endpoint.username, endpoint.password)
        if endpoint.tls:
            client.tls_set_context(context())
        client.will_set(self._topic("presence"), presence(False).SerializeToString(), qos=1, retain=True)
        client.max_queued_messages_set(MAX_QUEUED)
        client.reconnect_delay_set(1, RECONNECT_MAX_S)
        client.on_connect = self._on_connect
        client.on_disconnect = self._on_disconnect
        self._client = client

    def start(self) -> None:
        """Connect in the background, for ever."""
        self._client.connect_async(self._endpoint.host, self._endpoint.port, KEEP_ALIVE_S, clean_start=True)
        self._client.loop_start()

    async def stop(self) -> None:
        """Say goodbye (the last will is for bad ends) and end paho's thread."""
        if self.connected:
            goodbye = self._client.publish(
                self._topic("presence"), self._presence(False).SerializeToString(), qos=1, retain=True
            )
            await asyncio.to_thread(_wait_for, goodbye)
        self._client.disconnect()
        await asyncio.to_thread(self._client.loop_stop)

    def announce(self) -> None:
        """Publish that this node is there."""
        self._client.publish(self._topic("presence"), self._presence(True).SerializeToString(), qos=1, retain=True)

    def publish(self, batch: pb.Batch) -> bool:
        """Hand a batch to paho; False when it is not connected or its queue is full."""
        if not self.connected:
            return False
        sent = self._client.publish(self._topic(batch.stream), batch.SerializeToString(), qos=1)
        return sent.rc == MQTTErrorCode.MQTT_ERR_SUCCESS

    def _topic(self, stream: str) -> str:
        return f"{self._prefix}/{stream}"

    def _on_connect(self, _client: Any, _data: Any, _flags: Any, reason: Any, _properties: Any) -> None:
        if reason.is_failure:
            log.warning("the broker refused the connection", reason=str(reason))
            return
        self._loop.call_soon_threadsafe(self._set, True, str(reason))

    def _on_disconnect(self, _client: Any, _data: Any, _flags: Any, reason: Any, _properties: Any) -> None:
        self._loop.call_soon_threadsafe(self._set, False, str(reason))

    def _set(self, connected: bool, reason: str) -> None:
        if connected != self.connected:
            log.info("broker connected" if connected else "broker disconnected", reason=reason)
        self.connected = connected
        if connected:
            self.announce()
        self._changed(connected)


def _wait_for(message: mqtt.MQTTMessageInfo) -> None:
    try:
        message.wait_for_publish(timeout=2.0)
    except (ValueError, RuntimeError):
        return
