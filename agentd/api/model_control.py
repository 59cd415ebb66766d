"""``/api/models/load``, ``/api/models/unload`` and ``/api/models/status``: for programs on this device only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from agentd.api import checks
from agentd.api.errors import ApiError
from agentd.api.serving import Serving, of_refusal
from agentd.models.types import ModelKey, ModelStatus, Refused


@dataclass(frozen=True, slots=True)
class ControlRequest:
    """A checked request: which model."""

    model: str


def parse(raw: bytes) -> ControlRequest:
    """Check the bytes of a request. Raises ApiError (400)."""
    given = checks.parse_object(raw)
    name = checks.model_name(given)
    checks.refuse_unknown(given, ("model",), {})
    return ControlRequest(name)


class ModelControl:
    """Loads and unloads by hand, and says what is loaded."""

    def __init__(self, serving: Serving) -> None:
        self._serving = serving

    async def load(self, request: ControlRequest) -> dict[str, Any]:
        """Load now; the model's status when it is ready. It stays as long as its keep-alive says."""
        _, key = self._serving.target(request.model, relayed=False)
        try:
            await self._serving.host.load(key)
        except Refused as refusal:
            raise of_refusal(refusal) from refusal
        return self._one(key)

    async def unload(self, request: ControlRequest) -> dict[str, Any]:
        """Unload when nobody uses it any more; the model's status when its memory is back."""
        _, key = self._serving.target(request.model, relayed=False)
        try:
            await self._serving.host.unload(key)
        except Refused as refusal:
            raise of_refusal(refusal) from refusal
        return self._one(key)

    def status(self) -> dict[str, Any]:
        """All models of this node."""
        return {"object": "list", "data": [facts(status) for status in self._serving.host.status()]}

    def _one(self, key: ModelKey) -> dict[str, Any]:
        for status in self._serving.host.status():
            if status.key == key:
                return facts(status)
        raise ApiError(404, "model_not_found", f"{key} is being removed from this node", "model")


def facts(status: ModelStatus) -> dict[str, Any]:
    """A model's status; docs/api.md explains the fields."""
    return {
        "model": status.key.model,
        "version": status.key.version,
        "variant": status.key.variant,
        "format": status.format,
        "state": status.state.value,
        "reason": status.reason,
        "pid": status.pid,
        "memory_bytes": status.memory_bytes,
        "limit_bytes": status.limit_bytes,
        "in_flight": status.in_flight,
        "queued": status.queued,
        "load_seconds": status.load_seconds,
        "crashes": status.crashes,
        "degraded": status.degraded,
        "thrashing": status.thrashing,
        "log_lines": list(status.log_lines),
    }
