"""What keeps web pages away from the local API, which asks nobody for a key.

A page of any origin may send "simple" requests to this device: those are refused by their content type. A page whose
name was rebound to 127.0.0.1 would be of the same origin, and is refused by the name in its Host header.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Callable, Iterable


def host_filter(bound_to: str) -> Callable[[str], bool]:
    """Whether a Host header is one of this device. Only a loopback listener is that strict: others have names of their
    own in some network, and a firewall in front."""
    if not _is_loopback(bound_to):
        return lambda _: True
    own = socket.gethostname().lower()

    def allowed(header: str) -> bool:
        name = _without_port(header).lower().rstrip(".")
        return not name or name in ("localhost", own) or name.endswith(".localhost") or _is_address(name)

    return allowed


def is_json(headers: Iterable[tuple[bytes, bytes]]) -> bool:
    """Whether the content type is JSON: a browser asks first (CORS) before it sends that to another origin."""
    kinds = [value for name, value in headers if name == b"content-type"]
    return bool(kinds) and kinds[0].split(b";")[0].strip().lower() == b"application/json"


def _without_port(header: str) -> str:
    if header.startswith("["):
        return header[1:].partition("]")[0]
    return header.partition(":")[0]


def _is_loopback(address: str) -> bool:
    return _is_address(address) and ipaddress.ip_address(address).is_loopback


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
