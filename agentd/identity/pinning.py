"""The enrolment token and the authority that it pins: there is no trust on first use."""

from __future__ import annotations

import hashlib
import hmac
import re
import socket
import ssl
from dataclasses import dataclass
from typing import Any

from slmfleet.errors import UserError

_TOKEN = re.compile(r"slmfleet1\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.([0-9a-f]{64})")


@dataclass(frozen=True, slots=True, repr=False)
class Token:
    """A one-time enrolment token; ``text`` is a secret and is never printed."""

    text: str
    ca_sha256: str


def parse_token(text: str) -> Token:
    """``slmfleet1.<id>.<secret>.<hex SHA-256 of the CA certificate, DER>``. Raises UserError."""
    match = _TOKEN.fullmatch(text.strip())
    if match is None:
        raise UserError(
            "this is no enrolment token: it has the form slmfleet1.<id>.<secret>.<fingerprint>; "
            "make one with `fleetctl` or POST /api/v1/enrollment-tokens"
        )
    return Token(text.strip(), match[1])


def fetch_authority(host: str, port: int, timeout_s: float = 15.0) -> bytes:
    """DER of the last certificate that the server sends, unverified. Raises OSError when it can't be reached."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    with socket.create_connection((host, port), timeout=timeout_s) as plain:
        with context.wrap_socket(plain, server_hostname=host) as connection:
            chain = _chain(connection)
    if not chain:
        raise ssl.SSLError("the server sent no certificate")
    return chain[-1]


def _chain(connection: Any) -> list[bytes]:
    """The chain as the peer sent it, DER. Public since Python 3.13; in 3.11 and 3.12 on the inner object alone."""
    if hasattr(connection, "get_unverified_chain"):
        return list(connection.get_unverified_chain())
    import _ssl

    return [item.public_bytes(_ssl.ENCODING_DER) for item in connection._sslobj.get_unverified_chain() or ()]


def pinned_authority(token: Token, host: str, port: int) -> str:
    """PEM of the server's authority, if it is the one that the token names. Raises UserError if not, OSError."""
    der = fetch_authority(host, port)
    if not hmac.compare_digest(hashlib.sha256(der).hexdigest(), token.ca_sha256):
        raise UserError(
            f"the server at {host}:{port} is not the one that made this token (its authority has another "
            "fingerprint): check the address, or make a new token on that server"
        )
    return ssl.DER_cert_to_PEM_cert(der)
