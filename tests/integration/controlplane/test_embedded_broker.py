"""The broker out of the wheel does what the control plane and nodes lean on, over MQTT 5."""

from __future__ import annotations

import os
import queue
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import paho.mqtt.client as paho
import psutil
import pytest
from paho.mqtt.enums import CallbackAPIVersion

from controlplane.embedded import broker as subject
from controlplane.embedded.broker import EmbeddedBroker
from slmfleet.errors import UserError
from tests.support.processes import Child, assert_gone, nothing_left_behind, wait_until

pytestmark = pytest.mark.mqtt


class Client:
    """A paho client that keeps what arrives."""

    def __init__(self, broker: EmbeddedBroker, login: tuple[str, str], will: str | None = None) -> None:
        self.messages: queue.Queue[paho.MQTTMessage] = queue.Queue()
        self.connected = threading.Event()
        self.subscribed = threading.Event()
        self.refused = threading.Event()
        self.paho = paho.Client(CallbackAPIVersion.VERSION2, protocol=paho.MQTTv5, reconnect_on_failure=False)
        self.paho.username_pw_set(*login)
        if will:
            self.paho.will_set(will, b"gone", qos=1, retain=True)
        self.paho.on_connect = lambda *_: self.connected.set()
        self.paho.on_disconnect = lambda *_: self.refused.set()
        self.paho.on_subscribe = lambda *_: self.subscribed.set()
        self.paho.on_message = lambda _c, _u, message: self.messages.put(message)
        self.paho.connect(subject.HOST, broker.port, keepalive=5)
        self.paho.loop_start()

    def subscribe(self, topic: str) -> None:
        assert self.connected.wait(10)
        self.subscribed.clear()
        self.paho.subscribe(topic, qos=1)
        assert self.subscribed.wait(10)

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        assert self.connected.wait(10)
        sent = self.paho.publish(topic, payload, qos=1, retain=retain)
        sent.wait_for_publish(10)
        assert sent.is_published()

    def cut(self) -> None:
        """End the connection as a crash would: no DISCONNECT packet."""
        link = self.paho.socket()
        assert link is not None
        link.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.paho.disconnect()
        self.paho.loop_stop()


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedBroker]:
    made = EmbeddedBroker(tmp_path_factory.mktemp("mqtt"))
    with nothing_left_behind():
        made.start()
        yield made
        made.stop()


def test_retained_messages_last_will_and_acknowledged_delivery(broker: EmbeddedBroker) -> None:
    server = Client(broker, broker.credentials_of_server())
    node = Client(broker, broker.credentials_of_node("n1"), will="slmfleet/v1/n1/presence")
    late = Client(broker, broker.credentials_of_server())
    try:
        server.subscribe("slmfleet/v1/+/+")
        node.publish("slmfleet/v1/n1/presence", b"here", retain=True)
        node.publish("slmfleet/v1/n1/metrics", bytes(200_000))
        first, second = server.messages.get(timeout=10), server.messages.get(timeout=10)
        assert (first.payload, first.qos) == (b"here", 1)
        assert len(second.payload) == 200_000
        late.subscribe("slmfleet/v1/+/presence")
        kept = late.messages.get(timeout=10)
        assert (kept.payload, kept.retain) == (b"here", True)
        node.cut()
        assert server.messages.get(timeout=20).payload == b"gone"
    finally:
        for client in (server, node, late):
            client.close()


def test_a_node_s_password_opens_no_other_name(broker: EmbeddedBroker) -> None:
    first, second = broker.credentials_of_node("a"), broker.credentials_of_node("b")
    assert first != second
    wrong = Client(broker, (second[0], first[1]))
    try:
        assert wrong.refused.wait(10)
        assert not wrong.connected.is_set()
    finally:
        wrong.close()


def test_it_listens_on_loopback_alone(broker: EmbeddedBroker) -> None:
    listening = [c.laddr.ip for c in psutil.Process(broker.pid).net_connections("tcp") if c.status == "LISTEN"]
    assert listening == ["127.0.0.1"]


def test_no_password_is_readable_by_others(broker: EmbeddedBroker) -> None:
    _, password = broker.credentials_of_server()
    assert password not in " ".join(psutil.Process(broker.pid).cmdline())
    secret = Path(broker._folder) / "secret"
    assert secret.stat().st_mode & 0o077 == 0


def test_passwords_outlive_a_restart(tmp_path: Path) -> None:
    first, second = EmbeddedBroker(tmp_path / "mqtt"), EmbeddedBroker(tmp_path / "mqtt")
    first.start()
    first.stop()
    second.start()
    second.stop()
    assert first.credentials_of_node("n") == second.credentials_of_node("n")


def test_a_taken_port_is_one_sentence(tmp_path: Path) -> None:
    with socket.create_server((subject.HOST, 0)) as taken, nothing_left_behind():
        with pytest.raises(UserError, match="did not start"):
            EmbeddedBroker(tmp_path / "mqtt", taken.getsockname()[1]).start()


def test_it_dies_with_its_parent(tmp_path: Path) -> None:
    program = (
        "import sys, signal; from pathlib import Path; from controlplane.embedded.broker import EmbeddedBroker;"
        "b = EmbeddedBroker(Path(sys.argv[1])); b.start(); print('pid', b.pid, flush=True); signal.pause()"
    )
    with Child([sys.executable, "-c", program, tmp_path / "mqtt"]) as parent:
        pid = int(parent.wait_for_line(r"pid (\d+)")[1])
        os.kill(parent.pid, signal.SIGKILL)
        parent.wait_for_exit()
        wait_until(lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == "zombie", "the broker ends")
        assert_gone([pid])
