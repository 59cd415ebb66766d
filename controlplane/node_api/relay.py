"""Relay: the stream through which requests reach a node; the node opens it, nothing dials into a node."""

from __future__ import annotations

import asyncio

import grpc
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncEngine

from controlplane.db import nodes
from controlplane.node_api.exchange import RelayLink
from controlplane.node_api.identity import peer_node_id, refuse
from controlplane.node_api.links import NodeLinks
from controlplane.node_api.session import GONE
from slmfleet import logs
from slmfleet.v1 import relay_pb2_grpc

log = logs.get(__name__)

_LOST = "the connection to the node was lost"


class RelayService(relay_pb2_grpc.RelayServicer):
    """The gRPC handler of relays. Initial metadata is sent at once: a node that has it knows that it was let in."""

    def __init__(self, engine: AsyncEngine, links: NodeLinks) -> None:
        self._engine = engine
        self._links = links
        self._places = asyncio.Semaphore(8)

    async def Serve(self, request_iterator: object, context: grpc.aio.ServicerContext) -> None:
        """Serve one relay stream until it breaks or a newer one takes its place."""
        node_id = peer_node_id(context)
        if node_id is None:
            await refuse(context, grpc.StatusCode.UNAUTHENTICATED, "a relay needs the node's client certificate")
        name = await self._admit(node_id, context)
        link = RelayLink(node_id)
        try:
            await context.send_initial_metadata(())
            self._links.attach_relay(link)
            log.info("relay opened", node=name)
            await _serve(link, context)
        except grpc.aio.BaseError:
            link.close(_LOST)
        finally:
            self._links.detach_relay(link)
            # Cancelled by gRPC because the connection broke: requests under way hear of it now.
            link.close(_LOST)
            log.info("relay closed", node=name, reason=link.reason)

    async def _admit(self, node_id: str, context: grpc.aio.ServicerContext) -> str:
        try:
            async with self._places, self._engine.connect() as connection:
                node = await nodes.find(connection, node_id)
        except (OSError, sa.exc.SQLAlchemyError) as error:
            log.warning("cannot open a relay: the database is not there", error=error)
            await refuse(context, grpc.StatusCode.UNAVAILABLE, "the control plane has no database now: try again")
        if node is None or node.revoked:
            await refuse(context, grpc.StatusCode.PERMISSION_DENIED, GONE)
        return node.name


async def _serve(link: RelayLink, context: grpc.aio.ServicerContext) -> None:
    async with asyncio.TaskGroup() as group:
        reader = group.create_task(_read(link, context), name=f"relay-read-{link.node_id}")
        writer = group.create_task(_write(link, context), name=f"relay-write-{link.node_id}")
        await link.closed.wait()
        reader.cancel()
        writer.cancel()


async def _read(link: RelayLink, context: grpc.aio.ServicerContext) -> None:
    try:
        while (frame := await context.read()) is not grpc.aio.EOF:
            link.receive(frame)
        link.close("the node closed its relay")
    except grpc.aio.BaseError:
        link.close(_LOST)


async def _write(link: RelayLink, context: grpc.aio.ServicerContext) -> None:
    try:
        await link.write_to(context.write)
    except grpc.aio.BaseError:
        link.close(_LOST)
