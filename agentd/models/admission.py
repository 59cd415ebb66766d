"""Small pure decisions about requests: who is next, how long to wait, when a worker hangs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from agentd.models.planner import AGEING_PER_SECOND
from agentd.models.settings import BackoffSettings
from slmfleet.v1 import worker_pb2

# Chunks' worth of time without progress before a worker counts as hung: room for a machine that is busy elsewhere.
_HANG_CHUNKS = 20
# Until the prefill speed is known: that of a 7B model on a single-board computer.
_SLOWEST_PREFILL_TOKENS_PER_S = 4.0
# Tokens of an answer, and seconds, before its speed says anything.
_SPEED_TOKENS = 8
_SPEED_S = 2.0
# Weight of the newest value in running means.
_NEWEST = 0.3


class Waiting(Protocol):
    """What is compared of a request in the queue."""

    @property
    def priority(self) -> int: ...
    @property
    def submitted_s(self) -> float: ...


def rank(waiting: Waiting) -> tuple[float, float]:
    """Smaller is served first: greatest priority, aged by waiting; the oldest among equals.

    ``priority + rate * (now - submitted)`` orders two requests as ``priority - rate * submitted`` does, whatever the
    time is: the order never changes while both wait.
    """
    return (AGEING_PER_SECOND * waiting.submitted_s - waiting.priority, waiting.submitted_s)


def next_index(queue: Sequence[Waiting]) -> int:
    """Index of the request that is served next."""
    return min(range(len(queue)), key=lambda index: rank(queue[index]))


def running_mean(old: float | None, new: float) -> float:
    """Exponentially weighted mean; the first value stands for itself."""
    return new if old is None else old + _NEWEST * (new - old)


def retry_after_s(waiting: int, slots: int, service_s: float | None, oldest_running_s: float) -> float:
    """Seconds until a place is likely to be free: the queue's length over the rate at which it was served lately.

    Before anything was measured, the age of the oldest running request stands for the service time.
    """
    per_request = service_s if service_s is not None else max(1.0, oldest_running_s)
    return max(1.0, waiting * per_request / max(1, slots))


def backoff_s(crashes: int, settings: BackoffSettings) -> float:
    """Wait after the ``crashes``-th crash in a row (from 1)."""
    return min(settings.cap_s, settings.base_s * 2.0 ** min(crashes - 1, 30))


def hang_limit_s(prefill_tokens_per_s: float | None, chunk_tokens: int, floor_s: float) -> float:
    """Seconds without progress after which a worker hangs, from its measured prefill speed on this device.

    The longest honest silence is one prefill chunk (onnxruntime-genai holds the GIL through it).
    """
    if prefill_tokens_per_s is None:
        return max(floor_s, chunk_tokens / _SLOWEST_PREFILL_TOKENS_PER_S)
    return max(floor_s, _HANG_CHUNKS * chunk_tokens / max(prefill_tokens_per_s, 0.1))


def load_timeout_s(weight_bytes: int, floor_s: float, seconds_per_byte: float) -> float:
    """How long a load may take, from the size of the files."""
    return floor_s + weight_bytes * seconds_per_byte


def decode_speed(done: worker_pb2.WorkerReply.Done) -> float | None:
    """Tokens per second of a complete answer; None if it was too short to say."""
    if done.output_tokens < _SPEED_TOKENS or done.decode_seconds <= 0:
        return None
    return float(done.output_tokens / done.decode_seconds)


def speed_so_far(tokens: int, seconds: float) -> float | None:
    """Tokens per second of answers that are being written; None if it is too early to say. Silence counts too: few
    tokens in a long time are a speed."""
    if seconds < _SPEED_S or (tokens < _SPEED_TOKENS and seconds < 4 * _SPEED_S):
        return None
    return tokens / seconds
