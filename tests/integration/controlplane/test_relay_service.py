"""The relay over real mutual TLS: bytes both ways, slow readers, broken links."""

from __future__ import annotations

import asyncio
import hashlib
import time
from pathlib import Path

import grpc
import pytest

from controlplane.node_api.exchange import LinkLost, RelayLink
from tests.support.fake_node import FakeNode, NodeApiRig, NodeExchange, eventually, node_api

MEGABYTE = 1 << 20


def link_of(rig: NodeApiRig, node: FakeNode) -> RelayLink:
    link = rig.api.links.relay(node.id)
    assert link is not None
    return link


async def echo(exchange: NodeExchange) -> None:
    body = await exchange.read()
    await exchange.answer(200, body, x_path=exchange.opening.path)


def test_a_megabyte_goes_there_and_back(migrated_postgres_url: str, tmp_path: Path) -> None:
    async def run() -> None:
        async with node_api(migrated_postgres_url, tmp_path) as rig:
            node = await rig.enrolled("edge-1")
            async with node.relay(echo):
                body = hashlib.shake_128(b"seed").digest(MEGABYTE)
                response = await link_of(rig, node).request("POST", "/v1/echo", [], body, 20)
                assert response.status == 200
                assert ("x-path", "/v1/echo") in response.headers
                assert await response.read(2 * MEGABYTE) == body

    asyncio.run(run())


def test_a_slow_reader_stalls_nobody(migrated_postgres_url: str, tmp_path: Path) -> None:
    sent: dict[str, int] = {}

    async def pour(exchange: NodeExchange) -> None:
        """As much as the window lets through, up to a megabyte."""
        who = exchange.opening.path
        await exchange.head()
        for _ in range(MEGABYTE // 16384):
            await exchange.data(b"x" * 16384)
            sent[who] = sent.get(who, 0) + 16384
        await exchange.end()

    async def run() -> None:
        async with node_api(migrated_postgres_url, tmp_path) as rig:
            node = await rig.enrolled("edge-1")
            async with node.relay(pour):
                link = link_of(rig, node)
                slow = await link.request("GET", "/slow", [], b"", 60)
                for number in range(5):
                    fast = await link.request("GET", f"/fast{number}", [], b"", 20)
                    assert len(await fast.read(2 * MEGABYTE)) == MEGABYTE
                # All that time the slow one was held at its window.
                assert sent["/slow"] <= 64 * 1024
                assert len(await slow.read(2 * MEGABYTE)) == MEGABYTE

    asyncio.run(run())


@pytest.mark.parametrize("began", [False, True])
def test_a_node_killed_in_a_request_fails_it_at_once(migrated_postgres_url: str, tmp_path: Path, began: bool) -> None:
    async def hang(exchange: NodeExchange) -> None:
        if began:
            await exchange.head()
            await exchange.data(b"first words")
        await asyncio.Event().wait()

    async def run() -> None:
        async with node_api(migrated_postgres_url, tmp_path) as rig:
            node = await rig.enrolled("edge-1")
            async with node.relay(hang) as relay:
                link = link_of(rig, node)
                asked = asyncio.ensure_future(link.request("POST", "/", [], b"", 60))
                if began:
                    response = await asked
                    assert await anext(response) == b"first words"
                else:
                    await relay.has_served(1)
                killed = time.monotonic()
                await relay.kill()
                with pytest.raises(LinkLost) as caught:
                    await (anext(response) if began else asked)
                assert caught.value.began is began
                assert time.monotonic() - killed < 1
                assert rig.api.links.relay(node.id) is None

    asyncio.run(run())


def test_cancelling_reaches_the_node(migrated_postgres_url: str, tmp_path: Path) -> None:
    async def tick(exchange: NodeExchange) -> None:
        await exchange.head()
        while True:
            await exchange.data(b"tick")
            await asyncio.sleep(0.01)

    async def run() -> None:
        async with node_api(migrated_postgres_url, tmp_path) as rig:
            node = await rig.enrolled("edge-1")
            async with node.relay(tick) as relay:
                response = await link_of(rig, node).request("POST", "/", [], b"", 60)
                assert (await anext(response)).startswith(b"tick")
                response.close()
                assert await asyncio.wait_for(relay.resets.get(), 5) == "cancelled"
                await eventually(lambda: not relay.exchanges)

    asyncio.run(run())


def test_a_newer_relay_takes_over(migrated_postgres_url: str, tmp_path: Path) -> None:
    async def run() -> None:
        async with node_api(migrated_postgres_url, tmp_path) as rig:
            node = await rig.enrolled("edge-1")
            async with node.relay(echo):
                old = link_of(rig, node)
                async with node.relay(echo) as relay:
                    await asyncio.wait_for(old.closed.wait(), 5)
                    response = await link_of(rig, node).request("POST", "/", [], b"hi", 10)
                    assert await response.read(10) == b"hi"
                    assert relay.served == 1

    asyncio.run(run())


def test_a_revoked_node_gets_no_relay(migrated_postgres_url: str, tmp_path: Path) -> None:
    async def run() -> None:
        async with node_api(migrated_postgres_url, tmp_path) as rig:
            node = await rig.enrolled("edge-1")
            await rig.execute("UPDATE nodes SET revoked_at = now()")
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await node.relay(echo).__aenter__()
            assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
            assert rig.api.links.connected() == set()

    asyncio.run(run())


def test_a_revoked_node_loses_its_relay(migrated_postgres_url: str, tmp_path: Path) -> None:
    async def run() -> None:
        async with node_api(migrated_postgres_url, tmp_path) as rig:
            node = await rig.enrolled("edge-1")
            async with node.relay(echo):
                link = link_of(rig, node)
                await rig.execute("UPDATE nodes SET revoked_at = now()")
                await rig.execute("SELECT pg_notify('slmfleet', :topic)", topic=f"node:{node.id}")
                await asyncio.wait_for(link.closed.wait(), 5)

    asyncio.run(run())
