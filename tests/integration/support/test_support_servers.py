"""The servers that the suite stands on are real, private and separate."""

from __future__ import annotations

import asyncio
import sys
import threading

import asyncpg
import paho.mqtt.client as paho
import pytest
from paho.mqtt.enums import CallbackAPIVersion

from tests.support.mqtt import Mqtt
from tests.support.postgres import Databases
from tests.support.processes import Child, nothing_left_behind


async def _run(url: str, statement: str) -> list[asyncpg.Record]:
    connection = await asyncpg.connect(url)
    try:
        return await connection.fetch(statement)
    finally:
        await connection.close()


def test_a_database_is_empty_and_a_test_s_own(postgres_url: str, databases: Databases) -> None:
    other = databases.create()
    try:
        asyncio.run(_run(postgres_url, "CREATE TABLE t (x int)"))
        tables = "SELECT tablename FROM pg_tables WHERE schemaname = 'public'"
        assert [row["tablename"] for row in asyncio.run(_run(postgres_url, tables))] == ["t"]
        assert asyncio.run(_run(other, tables)) == []
    finally:
        databases.drop(other)


def test_the_broker_delivers(mqtt: Mqtt) -> None:
    arrived = threading.Event()
    subscribed = threading.Event()
    client = paho.Client(CallbackAPIVersion.VERSION2, protocol=paho.MQTTv5)
    client.username_pw_set(mqtt.username, mqtt.password)
    client.on_connect = lambda *_: client.subscribe("test/support/#", qos=1)
    client.on_subscribe = lambda *_: subscribed.set()
    client.on_message = lambda *_: arrived.set()
    client.connect(mqtt.host, mqtt.port)
    client.loop_start()
    try:
        assert subscribed.wait(10)
        client.publish("test/support/x", b"hello", qos=1)
        assert arrived.wait(10)
    finally:
        client.disconnect()
        client.loop_stop()


def test_a_child_is_heard_and_stopped() -> None:
    with nothing_left_behind():
        program = (
            "import signal, sys; signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM]); print('up 7', flush=True);"
            "signal.sigwait([signal.SIGTERM]); sys.exit(3)"
        )
        child = Child([sys.executable, "-c", program])
        assert child.wait_for_line(r"up (\d)")[1] == "7"
        with pytest.raises(AssertionError, match=r"0\.1 s passed"):
            child.wait_for_line("never", 0.1)
        assert child.stop() == 3
