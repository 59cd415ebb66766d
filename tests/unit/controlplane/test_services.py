"""Parts stop in the reverse order of their start, and one that ends by itself ends the program."""

from __future__ import annotations

import asyncio

import pytest

from controlplane.services import Service, run_services
from slmfleet.errors import UserError


def test_reverse_order() -> None:
    seen: list[str] = []

    def part(name: str) -> Service:
        async def run() -> None:
            seen.append(f"+{name}")
            try:
                await asyncio.Event().wait()
            finally:
                await asyncio.sleep(0)
                seen.append(f"-{name}")

        return Service(name, run)

    async def scenario() -> None:
        stop = asyncio.Event()
        await run_services([part("a"), part("b"), part("c")], stop.set, stop)

    asyncio.run(scenario())
    assert seen == ["+a", "+b", "+c", "-c", "-b", "-a"]


def test_a_part_that_returns_is_an_error() -> None:
    async def scenario() -> None:
        async def returns() -> None:
            return

        async def waits() -> None:
            await asyncio.Event().wait()

        await run_services([Service("x", returns), Service("y", waits)], lambda: None, asyncio.Event())

    with pytest.raises(ExceptionGroup) as caught:
        asyncio.run(scenario())
    assert caught.group_contains(UserError, match="x ended by itself")


def test_a_part_that_does_not_stop_holds_up_nobody_for_ever() -> None:
    ended: list[str] = []

    async def scenario() -> None:
        stop = asyncio.Event()
        release = asyncio.Event()

        async def stubborn() -> None:
            try:
                await asyncio.Event().wait()
            finally:
                await release.wait()
                ended.append("stubborn")

        async def polite() -> None:
            try:
                await asyncio.Event().wait()
            finally:
                ended.append("polite")
                release.set()

        await run_services([Service("polite", polite), Service("stubborn", stubborn, 0.01)], stop.set, stop)

    asyncio.run(scenario())
    assert ended == ["polite", "stubborn"]
