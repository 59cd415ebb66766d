"""Bad lines: that a cut is really silent, and what a slow, late or half-open broker connection does to a node."""

from __future__ import annotations

import socket
import threading
import time

import pytest

from tests.reliability.forms import long_only
from tests.reliability.site import MODEL, site
from tests.support import netns
from tests.support.processes import wait_until
from tests.support.tcp_proxy import TcpProxy


@pytest.mark.skipif(bool(netns.why_not()), reason=netns.why_not())
def test_a_cut_is_silent_and_a_mended_line_goes_on_where_it_was() -> None:
    with netns.network() as net, socket.create_server((net.address, 0)) as listener:
        member = net.join()
        near = member.call(lambda: socket.create_connection(listener.getsockname(), timeout=5))
        far, (host, _) = listener.accept()
        with near, far:
            assert host == member.address
            near.settimeout(1.0)
            far.settimeout(10.0)
            member.cut()
            far.send(b"lost?")
            with pytest.raises(TimeoutError):
                near.recv(16)
            began = time.monotonic()
            with pytest.raises(TimeoutError):
                member.call(lambda: socket.create_connection(listener.getsockname(), timeout=1))
            assert time.monotonic() - began >= 1.0, "nobody refuses: nobody answers"
            member.mend()
            near.settimeout(10.0)
            assert near.recv(16) == b"lost?"


def test_the_proxy_delays_slows_and_holds() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, TcpProxy(*listener.getsockname()) as proxy:
        with socket.create_connection(("127.0.0.1", proxy.port), timeout=5) as near, listener.accept()[0] as far:
            far.settimeout(5)
            proxy.delay_s = 0.3
            began = time.monotonic()
            near.send(b"late")
            assert far.recv(16) == b"late"
            assert time.monotonic() - began >= 0.3
            proxy.delay_s, proxy.bytes_per_s = 0.0, 10_000
            began, got = time.monotonic(), 0
            near.send(bytes(5_000))
            while got < 5_000:
                got += len(far.recv(4096))
            assert time.monotonic() - began >= 0.3
            proxy.bytes_per_s, proxy.half_open = 0, True
            near.send(b"held")
            far.settimeout(0.3)
            with pytest.raises(TimeoutError):
                far.recv(16)
            proxy.half_open = False
            far.settimeout(5)
            assert far.recv(16) == b"held"


@long_only
@pytest.mark.postgres
@pytest.mark.mqtt
@pytest.mark.system
def test_a_broker_that_is_slow_late_or_half_open_loses_nothing() -> None:
    with site() as fleet:
        node = fleet.add_node("edge-1")
        fleet.serve_model()
        with node.asker().all_along(MODEL) as asked:
            fleet.mqtt_line.half_open = True
            threading.Event().wait(2.0)
            waiting = node.status()["outbox"]
            assert waiting["rows"] + waiting["batches"] > 0
            fleet.mqtt_line.half_open = False
            fleet.mqtt_line.delay_s, fleet.mqtt_line.bytes_per_s = 0.2, 4_000
            threading.Event().wait(1.0)
            # In the middle of what is on its way.
            fleet.mqtt_line.reset()
            fleet.mqtt_line.delay_s = fleet.mqtt_line.bytes_per_s = 0
            wait_until(lambda: node.status()["broker_connected"], "the broker is back", 40)
            found = fleet.await_rows(node, 60)
        assert found.twice == []
        assert found.dropped == 0
        assert asked.failures == []
