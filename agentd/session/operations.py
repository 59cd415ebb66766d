"""Operations: requests of the control plane that are no state. They carry an id, expire, and may be delivered twice."""

from __future__ import annotations

import json
from collections import OrderedDict

from slmfleet.v1 import session_pb2 as pb

REMEMBERED = 256


class Operations:
    """Answers operations; a repeated id gets the answer that it got before."""

    def __init__(self) -> None:
        self._answered: OrderedDict[str, pb.OperationResult] = OrderedDict()

    def answer(self, operation: pb.Operation, now_s: float) -> pb.OperationResult | None:
        """The result; None for one that expired unseen (``now_s``: seconds since 1970)."""
        if operation.id in self._answered:
            return self._answered[operation.id]
        if operation.HasField("expires_at") and operation.expires_at.ToMilliseconds() / 1000 < now_s:
            return None
        result = _perform(operation)
        self._answered[operation.id] = result
        while len(self._answered) > REMEMBERED:
            self._answered.popitem(last=False)
        return result


def _perform(operation: pb.Operation) -> pb.OperationResult:
    if operation.kind == "ping":
        return pb.OperationResult(id=operation.id, succeeded=True, message="pong", result_json=json.dumps({}).encode())
    return pb.OperationResult(
        id=operation.id, succeeded=False, message=f"this agentd does not know the operation {operation.kind!r}"
    )
