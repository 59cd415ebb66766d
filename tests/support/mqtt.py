"""An MQTT broker for the tests. See ``choose`` for where it comes from."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

from tests.support.postgres import docker_answers
from tests.support.processes import Child, free_port


@dataclass(frozen=True)
class Mqtt:
    """Where the broker listens; ``username`` and ``password`` are None where it asks for none."""

    host: str
    port: int
    username: str | None = None
    password: str | None = None

    @property
    def url(self) -> str:
        """``mqtt://[user:password@]host:port``."""
        login = f"{quote(self.username, '')}:{quote(self.password or '', '')}@" if self.username else ""
        return f"mqtt://{login}{self.host}:{self.port}"


@dataclass(frozen=True)
class Source:
    """Where the broker comes from: words for the header, and a context that runs it."""

    description: str
    run: Callable[[], contextlib.AbstractContextManager[Mqtt]]


def choose() -> Source:
    """``SLMFLEET_TEST_MQTT_URL``, else a local Mosquitto, else a container, else the wheel. Starts nothing."""
    if url := os.environ.get("SLMFLEET_TEST_MQTT_URL"):
        parts = urlsplit(url)
        given = Mqtt(
            parts.hostname or "127.0.0.1",
            parts.port or 1883,
            unquote(parts.username) if parts.username else None,
            unquote(parts.password) if parts.password else None,
        )
        return Source(
            f"SLMFLEET_TEST_MQTT_URL ({given.host}:{given.port})",
            lambda: contextlib.nullcontext(given),
        )
    program = shutil.which("mosquitto") or shutil.which("mosquitto", path="/usr/sbin:/usr/local/sbin")
    if program:
        return Source(f"private instance of {program}", lambda: _run_local(program))
    if docker_answers():
        return Source("testcontainers (eclipse-mosquitto:2)", _run_container)
    return Source("the iotcore wheel (rumqttd)", _run_wheel)


@contextlib.contextmanager
def _run_local(program: str) -> Iterator[Mqtt]:
    with tempfile.TemporaryDirectory(prefix="slmfleet-mqtt-") as folder:
        for attempt in range(5):
            port = free_port()
            settings = Path(folder) / "mosquitto.conf"
            # The queue holds a burst of a whole test; "user root" keeps the uid of whoever runs the tests.
            settings.write_text(
                f"listener {port} 127.0.0.1\nallow_anonymous true\npersistence false\nuser root\n"
                "max_queued_messages 100000\n"
            )
            with Child([program, "-c", settings]) as broker:
                try:
                    broker.wait_for_line(r"mosquitto version .* running", 10)
                except AssertionError:
                    if attempt == 4 or "Address already in use" not in broker.output:
                        raise
                    continue
                yield Mqtt("127.0.0.1", port)
                broker.stop()
                return


@contextlib.contextmanager
def _run_container() -> Iterator[Mqtt]:
    from testcontainers.core.container import DockerContainer
    from testcontainers.core.wait_strategies import LogMessageWaitStrategy

    container = (
        DockerContainer("eclipse-mosquitto:2")
        .with_command("mosquitto -c /mosquitto-no-auth.conf")
        .with_exposed_ports(1883)
        .waiting_for(LogMessageWaitStrategy("running"))
    )
    with container:
        yield Mqtt(container.get_container_host_ip(), int(container.get_exposed_port(1883)))


@contextlib.contextmanager
def _run_wheel() -> Iterator[Mqtt]:
    from controlplane.embedded.broker import EmbeddedBroker

    with tempfile.TemporaryDirectory(prefix="slmfleet-mqtt-") as folder:
        broker = EmbeddedBroker(Path(folder))
        broker.start()
        try:
            username, password = broker.credentials_of_server()
            yield Mqtt("127.0.0.1", broker.port, username, password)
        finally:
            broker.stop()
