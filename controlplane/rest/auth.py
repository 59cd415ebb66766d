"""Who calls: bearer keys, looked up by hash, remembered for a few seconds so that a busy caller costs no query."""

from __future__ import annotations

import hmac
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from sqlalchemy.ext.asyncio import AsyncEngine

from controlplane.db import api_keys

# Longest Authorization header that is looked at, in characters.
_MAX_HEADER = 512


@dataclass(frozen=True, slots=True)
class Principal:
    """The holder of a key. ``role``: admin (REST and gateway) or gateway (the gateway only)."""

    id: str
    name: str
    role: str

    @property
    def is_admin(self) -> bool:
        """Whether REST is open to it."""
        return self.role == "admin"


class Unauthorized(Exception):
    """No key, or one that is not good (any more). The text is a sentence for the caller."""


class Authenticator:
    """Knows the principals behind ``Authorization`` headers. One per process, shared by REST and gateway.

    ``cache_s``: seconds for which a key that was good is good without asking again. So long may a revoked key work in
    another process; in the process that revokes it, ``forget`` ends it at once.
    """

    def __init__(
        self,
        engine: AsyncEngine,
        *,
        cache_s: float = 10.0,
        cache_size: int = 1024,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._engine = engine
        self._cache_s = cache_s
        self._cache_size = cache_size
        self._clock = clock
        # Hash of the key -> principal and the time until which that holds; the oldest first.
        self._known: OrderedDict[str, tuple[Principal, float]] = OrderedDict()

    async def authenticate(self, authorization: str | None) -> Principal:
        """The principal of an ``Authorization`` header's value (None: there was none).

        Raises Unauthorized, or a database error when the key is not remembered and Postgres can't be asked.
        """
        digest = api_keys.hash_secret(_bearer(authorization))
        principal, until = self._known.get(digest, (None, 0.0))
        if principal is not None and self._clock() < until:
            return principal
        return await self._look_up(digest)

    def forget(self) -> None:
        """Ask Postgres again for every key from now on."""
        self._known.clear()

    async def _look_up(self, digest: str) -> Principal:
        started = self._clock()
        async with self._engine.connect() as connection:
            row = await api_keys.find(connection, digest)
        if row is None or not hmac.compare_digest(row.secret_sha256, digest):
            self._known.pop(digest, None)
            raise Unauthorized("this API key is unknown, expired or revoked")
        principal = Principal(row.id, row.name, row.role)
        good_for = self._cache_s if row.left_s is None else min(self._cache_s, row.left_s)
        self._known[digest] = (principal, started + good_for)
        self._known.move_to_end(digest)
        while len(self._known) > self._cache_size:
            self._known.popitem(last=False)
        return principal


def _bearer(authorization: str | None) -> str:
    if not authorization:
        raise Unauthorized("this needs an API key: send the header Authorization: Bearer slmfleet_...")
    scheme, _, secret = authorization[:_MAX_HEADER].partition(" ")
    if scheme.lower() != "bearer" or not secret.strip():
        raise Unauthorized("the Authorization header holds no key: send Authorization: Bearer slmfleet_...")
    return secret.strip()
