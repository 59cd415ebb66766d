"""Who calls: the common name of the certificate that the TLS handshake verified, and nothing else."""

from __future__ import annotations

from typing import NoReturn

import grpc


def peer_node_id(context: grpc.aio.ServicerContext) -> str | None:
    """The node id in the peer's verified client certificate; None without one."""
    names: list[bytes] = list(context.auth_context().get("x509_common_name") or ())
    return names[0].decode(errors="replace") if len(names) == 1 else None


def peer_address(context: grpc.aio.ServicerContext) -> str:
    """The peer's address without its port: ``10.0.0.7``, ``[::1]``."""
    kind, _, rest = context.peer().partition(":")
    return rest.rpartition(":")[0] if kind in ("ipv4", "ipv6") else context.peer()


async def refuse(context: grpc.aio.ServicerContext, code: grpc.StatusCode, message: str) -> NoReturn:
    """End the call with a status; never returns."""
    await context.abort(code, message)
    raise AssertionError("abort returned")
