"""What the routes are given: made once, in the composition root."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Protocol

from fastapi import Depends, Path, Request
from sqlalchemy.ext.asyncio import AsyncEngine

from controlplane.domain.names import NAME_PATTERN
from controlplane.rest.auth import Authenticator, Principal
from controlplane.rest.guard import principal_of


class BlobWriter(Protocol):
    """The part of the artifact store that uploads need."""

    async def write(self, sha256: str, chunks: AsyncIterator[bytes]) -> int:
        """Store the bytes and return how many there were. Raises DigestMismatch, StoreFull or OSError."""
        ...


class Explainer(Protocol):
    """Says why a deployment runs where it runs."""

    async def explain(self, name: str) -> list[dict[str, Any]]:
        """``{node, chosen, reason, ...}`` for each node, by name. Raises KeyError when there is no deployment."""
        ...


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """What ``GET /api/v1/info`` tells. ``endpoints``: node_api, enrollment, artifacts, mqtt as host:port or URL."""

    beat_s: float
    ttl_s: float
    endpoints: Mapping[str, str] = field(default_factory=dict)
    # Base URL of the OpenAI-compatible gateway.
    gateway: str = ""


@dataclass(frozen=True, slots=True)
class Context:
    """Everything that routes use."""

    engine: AsyncEngine
    authenticator: Authenticator
    blobs: BlobWriter
    explainer: Explainer
    # Hex SHA-256 of the CA certificate (DER), for enrolment tokens.
    ca_fingerprint: str
    info: ServerInfo


def _caller(request: Request) -> Principal:
    return principal_of(request.scope)


Caller = Annotated[Principal, Depends(_caller)]
ObjectName = Annotated[str, Path(pattern=NAME_PATTERN, description="Name of the object, a DNS label.")]
ObjectId = Annotated[str, Path(pattern=r"^[A-Za-z0-9_-]{1,128}$", description="Id of the object.")]
