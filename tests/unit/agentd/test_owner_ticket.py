"""The answer's way from the owner to its reader."""

from __future__ import annotations

import asyncio

import pytest

from agentd.models.ticket import Ticket
from agentd.models.types import Chunk, Done, GenerateRequest, GenerationFailed, ModelKey
from slmfleet.v1.worker_pb2 import WorkerRequest

DONE = Done("stop", 1, 2)


def ticket() -> Ticket:
    return Ticket(GenerateRequest(ModelKey("m", "1", "v"), {}), WorkerRequest(), 0.0)


async def read(source: Ticket) -> list[Chunk | Done]:
    return [item async for item in source]  # type: ignore[misc]


def test_pieces_come_one_by_one_and_past_a_bound_unread_text_is_joined():
    async def scenario():
        t = ticket()
        t.push(Chunk({"role": "assistant", "content": "a"}), 1.0)
        for _ in range(2000):
            t.push(Chunk({"content": "b"}), 2.0)
        t.push(Chunk({"tool_calls": []}), 3.0)
        t.push(Chunk({"content": "c"}, 1, logprobs={"x": 1}), 4.0)
        t.push(Chunk({"content": "d"}), 5.0)
        t.finish(DONE)
        return t, await anext(t), t.rest()

    t, first, (*items, done) = asyncio.run(scenario())
    assert first.delta == {"role": "assistant", "content": "a"}
    assert items[0] == Chunk({"content": "b"})
    assert len(items) < 1100
    assert sum(item.tokens for item in items) == 2003
    assert "".join(item.delta.get("content", "") for item in items) == "b" * 2000 + "cd"
    # What is no plain text is never joined.
    assert [item.delta for item in items[-3:]] == [{"tool_calls": []}, {"content": "c"}, {"content": "d"}]
    assert done == DONE
    assert t.rest() == []
    assert t.first_token_s == 1.0


def test_error_comes_after_what_was_said():
    async def scenario():
        t = ticket()
        t.push(Chunk({"content": "a"}), 1.0)
        t.fail(GenerationFailed("worker_failed", "gone"))
        assert (await anext(t)).delta == {"content": "a"}
        with pytest.raises(GenerationFailed, match="gone"):
            await anext(t)

    asyncio.run(scenario())


def test_nothing_after_the_end():
    async def scenario():
        t = ticket()
        t.finish(DONE)
        t.finish(DONE)
        t.push(Chunk({"content": "late"}), 1.0)
        t.fail(GenerationFailed("x", "y"))
        return await read(t)

    assert asyncio.run(scenario()) == [DONE]


def test_reader_that_waits_is_woken():
    async def scenario():
        t = ticket()
        async with asyncio.TaskGroup() as group:
            reader = group.create_task(read(t))
            await asyncio.sleep(0)
            t.push(Chunk({"content": "a"}), 1.0)
            await asyncio.sleep(0)
            t.finish(DONE)
        return reader.result()

    assert len(asyncio.run(scenario())) == 2
