"""Enrolment tokens: ``slmfleet1.<id>.<secret>.<hex SHA-256 of the CA certificate, DER>``.

The database keeps the SHA-256 of the secret, never the secret. Whether a token is good is decided by ``judge`` from
the stored row and the database's time alone.
"""

from __future__ import annotations

import datetime
import hashlib
import hmac
import re
import secrets
from dataclasses import dataclass, field

PREFIX = "slmfleet1"
_PART = re.compile(r"[A-Za-z0-9_-]{1,128}")
_FINGERPRINT = re.compile(r"[0-9a-f]{64}")
_AGAIN = "make a new one with `fleetctl token create`"


@dataclass(frozen=True, slots=True)
class Token:
    """A token as text in four parts."""

    id: str
    secret: str = field(repr=False)
    fingerprint: str

    def __str__(self) -> str:
        return f"{PREFIX}.{self.id}.{self.secret}.{self.fingerprint}"


@dataclass(frozen=True, slots=True)
class StoredToken:
    """What the database holds of a token."""

    secret_sha256: str
    uses_left: int
    expires_at: datetime.datetime
    revoked: bool


def new(fingerprint: str) -> Token:
    """A fresh token (256 bits of secret) for the authority with this fingerprint."""
    return Token(secrets.token_hex(6), secrets.token_urlsafe(32), fingerprint)


def parse(text: str) -> Token:
    """The parts of a token. Raises ValueError with a sentence that says what a token looks like."""
    parts = text.strip().split(".")
    if (
        len(parts) != 4
        or parts[0] != PREFIX
        or not all(_PART.fullmatch(part) for part in parts[1:3])
        or not _FINGERPRINT.fullmatch(parts[3])
    ):
        raise ValueError(
            f"this is no enrolment token (one looks like {PREFIX}.<id>.<secret>.<fingerprint>): "
            f"copy it whole, or {_AGAIN}"
        )
    return Token(*parts[1:])


def hash_secret(secret: str) -> str:
    """What ``enrollment_tokens.secret_sha256`` holds: lower-case hex SHA-256 of the secret's UTF-8 bytes."""
    return hashlib.sha256(secret.encode()).hexdigest()


def genuine(stored: StoredToken | None, secret: str) -> bool:
    """Whether the secret is the token's, whatever else is true of the token."""
    held = stored.secret_sha256 if stored else "0" * 64
    return hmac.compare_digest(held, hash_secret(secret)) and stored is not None


def judge(stored: StoredToken | None, secret: str, now: datetime.datetime) -> str | None:
    """None when the token may be used now, else the sentence for the person who holds it.

    A wrong secret reads like an unknown token, so that an id alone tells nothing about its token.
    """
    if not genuine(stored, secret) or stored is None:
        return f"token is unknown: copy it whole, or {_AGAIN}"
    if stored.revoked:
        return f"token was revoked: {_AGAIN}"
    if stored.expires_at <= now:
        return f"token has expired: {_AGAIN}"
    if stored.uses_left <= 0:
        return f"token has been used: {_AGAIN}"
    return None
