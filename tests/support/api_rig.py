"""The local API over a real model host, served by uvicorn on a free port, with the real ``openai`` client before it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

import httpx2
import openai

from agentd.agents.router import Catalog, Target
from agentd.api.app import Api
from agentd.api.guard import host_filter
from agentd.api.prometheus import Snapshot, render
from agentd.api.server import ApiServer, address_of, bind
from agentd.api.serving import Serving
from agentd.models.host import Host
from agentd.models.settings import HostSettings
from agentd.models.types import LoadableModel
from slmfleet.v1 import state_pb2 as pb
from tests.support.hosts import running


async def _ready() -> dict[str, bool]:
    return {"ready": True}


class ApiRig:
    """A served API: ``openai`` asks it, ``http`` sends what no good client would."""

    def __init__(self, host: Host, api: Api, url: str) -> None:
        self.host = host
        self.api = api
        self.url = url
        self.openai = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60)
        self.http = httpx2.AsyncClient(base_url=url, trust_env=False, timeout=60)


def bare(model: LoadableModel) -> Target:
    """A deployment of a model, without an agent, under the model's name."""
    key = model.key
    return Target(f"a-{key.model}", key.model, key.model, key.version, None, key, "")


def agent(model: LoadableModel, name: str, **fields: Any) -> Target:
    """A deployment of an agent on a model."""
    manifest = pb.AgentManifest(name=name, expose=[pb.EXPOSURE_LOCAL, pb.EXPOSURE_GATEWAY], **fields)
    key = model.key
    return Target(f"a-{name}", f"{name}-deployment", key.model, key.version, manifest, key, "")


@contextlib.asynccontextmanager
async def api_rig(
    models: Sequence[LoadableModel],
    *,
    targets: Sequence[Target] = (),
    settings: HostSettings | None = None,
    max_request_bytes: int = 1 << 20,
) -> AsyncIterator[ApiRig]:
    """Serve these models; targets beside the bare models are added."""
    catalog = Catalog((*map(bare, models), *targets))
    async with running(Host(settings or HostSettings()), models) as host:

        async def metrics() -> bytes:
            counts = host.totals()
            return render(Snapshot(1.0, 1, False, 0, False, 0, {}, 0, 0, 0, 0, api.in_flight, counts, host.status()))

        async def status() -> dict[str, Any]:
            return {}

        api = Api(
            Serving(host, lambda: catalog, lambda _key, _code: None),
            lambda: catalog,
            ready=_ready,
            status=status,
            metrics=metrics,
            max_request_bytes=max_request_bytes,
            max_requests=64,
            host_allowed=host_filter("127.0.0.1"),
            created_s=1,
        )
        listener = bind(("127.0.0.1", 0))
        started = asyncio.Event()
        server = ApiServer(api, listener, started.set)
        serving = asyncio.create_task(server.run(), name="api server")
        await started.wait()
        rig = ApiRig(host, api, f"http://{address_of(listener)}")
        try:
            yield rig
        finally:
            await rig.openai.close()
            await rig.http.aclose()
            server.stop()
            await serving


def with_api(
    models: Sequence[LoadableModel], test: Callable[[ApiRig], Awaitable[None]], *, timeout_s: float = 90, **options: Any
) -> None:
    """Run one test against a served API."""

    async def run() -> None:
        async with asyncio.timeout(timeout_s), api_rig(models, **options) as rig:
            await test(rig)

    asyncio.run(run())
