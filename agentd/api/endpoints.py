"""Which code serves which path. All but chats are imported with their first request: most nodes never get one."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from agentd.api.chat import Chat
from agentd.api.errors import ApiError
from agentd.api.serving import Serving
from agentd.api.sse import SendBody, SendStart
from agentd.api.validation import parse_chat

Serve = Callable[[bytes, bool, SendStart, SendBody], Awaitable[None]]

GENERATORS = frozenset({"/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses"})
# Path to method.
CONTROLS = {"/api/models/load": "POST", "/api/models/unload": "POST", "/api/models/status": "GET"}


class Endpoints:
    """Serves the paths of GENERATORS and CONTROLS."""

    def __init__(self, serving: Serving) -> None:
        self._serving = serving
        self._chat = Chat(serving)
        self._serve: dict[str, Serve] = {"/v1/chat/completions": self._serve_chat}

    async def generate(self, path: str, raw: bytes, relayed: bool, start: SendStart, body: SendBody) -> None:
        """Check and answer one request. Raises ApiError."""
        serve = self._serve.get(path)
        if serve is None:
            serve = self._serve[path] = self._imported(path)
        await serve(raw, relayed, start, body)

    async def _serve_chat(self, raw: bytes, relayed: bool, start: SendStart, body: SendBody) -> None:
        request = parse_chat(raw)
        _refuse_relayed(request.keep_alive_s, relayed)
        await self._chat.answer(request, relayed, start, body)

    def _imported(self, path: str) -> Serve:
        parse: Any
        served: Any
        match path:
            case "/v1/completions":
                from agentd.api.completions import Completions, parse

                served = Completions(self._serving)
            case "/v1/embeddings":
                from agentd.api.embeddings import Embeddings, parse

                served = Embeddings(self._serving)
            case _:
                from agentd.api.responses import Responses
                from agentd.api.responses_request import parse

                served = Responses(self._serving)

        async def serve(raw: bytes, relayed: bool, start: SendStart, body: SendBody) -> None:
            request = parse(raw)
            _refuse_relayed(request.keep_alive_s, relayed)
            await served.answer(request, relayed, start, body)

        return serve

    async def control(self, path: str, raw: bytes) -> dict[str, Any]:
        """Load or unload; what to answer. Raises ApiError."""
        from agentd.api.model_control import ModelControl, parse

        control = ModelControl(self._serving)
        request = parse(raw)
        return await (control.load(request) if path == "/api/models/load" else control.unload(request))

    def status(self) -> dict[str, Any]:
        """What to answer to /api/models/status."""
        from agentd.api.model_control import ModelControl

        return ModelControl(self._serving).status()


def _refuse_relayed(keep_alive_s: float | None, relayed: bool) -> None:
    """How long a model holds this device's memory is decided on it, or in the agent's manifest."""
    if relayed and keep_alive_s is not None:
        raise ApiError(
            400, "unsupported_value", "`keep_alive` is for programs on the device: leave it out",
            "keep_alive",
        )  # fmt: skip
