"""Frames between agentd and a worker."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentd.models.wire import MAX_FRAME_BYTES, FrameSplitter, FrameTooLarge, encode
from slmfleet.v1.worker_pb2 import WorkerReply


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text(max_size=200), max_size=8), st.integers(1, 50))
def test_frames_survive_any_cut(texts, step):
    messages = [WorkerReply(request_id=n, chunk=WorkerReply.Chunk(text=text)) for n, text in enumerate(texts)]
    stream = b"".join(map(encode, messages))
    splitter = FrameSplitter()
    found = [p for start in range(0, len(stream), step) for p in splitter.feed(stream[start : start + step])]
    assert [WorkerReply.FromString(payload) for payload in found] == messages


def test_refuses_an_announced_giant():
    with pytest.raises(FrameTooLarge, match="4294967295 bytes"):
        FrameSplitter().feed(b"\xff\xff\xff\xff")


def test_refuses_to_send_a_giant():
    with pytest.raises(FrameTooLarge):
        encode(WorkerReply(chunk=WorkerReply.Chunk(text="x" * (MAX_FRAME_BYTES + 1))))
