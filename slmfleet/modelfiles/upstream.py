"""An upstream model: a folder with ``upstream.json``, which says where an OpenAI-compatible server is.

::

    {"url": "http://127.0.0.1:11434/v1", "model": "qwen2.5:0.5b", "key": "ollama",
     "maxConcurrent": 4, "contextTokens": 4096, "connectSeconds": 5, "stallSeconds": 60}

``url`` and ``model`` are required. ``key`` is the *name* of a file in the folder that the node's owner keeps keys in
(agentd's ``upstream_keys``), never the key itself: a manifest is readable by many.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, urlsplit

from slmfleet.modelfiles.facts import ModelFacts, NotAModel, read_object

FILE = "upstream.json"
# Variables in which agentd tells a worker which addresses are allowed, and where the keys are.
HOSTS, KEYS = "SLMFLEET_UPSTREAM_HOSTS", "SLMFLEET_UPSTREAM_KEYS"
_KNOWN = {"url", "model", "key", "maxConcurrent", "contextTokens", "connectSeconds", "stallSeconds"}
_KEY_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_HOST = re.compile(r"[A-Za-z0-9._:-]{1,253}")


@dataclass(frozen=True, slots=True)
class Upstream:
    """Where and how. ``path`` ends without a slash; durations in seconds."""

    tls: bool
    host: str
    port: int
    path: str
    model: str
    # Name of a key file; "" = the server wants none.
    key: str
    max_concurrent: int
    context_tokens: int
    connect_s: float
    # Longest silence of a server that works on an answer.
    stall_s: float

    @property
    def address(self) -> str:
        """host:port, as the node's owner allows it."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def is_here(self) -> bool:
        """True if the server is on this device."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


def inspect_upstream(entry: Path) -> ModelFacts:
    """Facts of an upstream model: only its context, if that was stated. Raises NotAModel."""
    upstream = read_upstream(entry)
    return ModelFacts("upstream", upstream.context_tokens, 0, 0, (), 0, 0, 0, has_chat_template=True)


def leads_away(folder: Path) -> bool:
    """True for a variant whose server is not on this device, or can't be told to be."""
    if not (folder / FILE).is_file():
        return False
    try:
        return not read_upstream(folder).is_here
    except (NotAModel, OSError):
        return True


def read_upstream(entry: Path) -> Upstream:
    """Read and check ``upstream.json`` in the folder ``entry``. Raises NotAModel."""
    try:
        given = read_object(entry / FILE)
    except FileNotFoundError:
        raise NotAModel(f"{entry} is no upstream model: it has no {FILE}") from None
    if unknown := sorted(set(given) - _KNOWN):
        raise NotAModel(f"{FILE} has an unknown key {unknown[0][:60]!r}; known are {', '.join(sorted(_KNOWN))}")
    url = _url(given.get("url"))
    key = given.get("key", "")
    if not isinstance(key, str) or (key and not _KEY_NAME.fullmatch(key)):
        raise NotAModel(f"`key` in {FILE} must be the name of a key file on the node, not a path and not a key")
    model = given.get("model")
    if not isinstance(model, str) or not 0 < len(model) <= 300 or not model.isprintable():
        raise NotAModel(f"`model` in {FILE} must be the name that the server gives the model")
    assert url.hostname is not None
    return Upstream(
        tls=url.scheme == "https",
        host=url.hostname,
        port=url.port or (443 if url.scheme == "https" else 80),
        path=url.path.rstrip("/"),
        model=model,
        key=key,
        max_concurrent=int(_number(given, "maxConcurrent", 4, 1, 256)),
        context_tokens=int(_number(given, "contextTokens", 0, 0, 2**24)),
        connect_s=_number(given, "connectSeconds", 5.0, 0.1, 60.0),
        stall_s=_number(given, "stallSeconds", 60.0, 0.5, 3600.0),
    )


def _url(value: Any) -> SplitResult:
    wanted = f"`url` in {FILE} must be http:// or https:// with a host, such as http://127.0.0.1:11434/v1"
    if not isinstance(value, str) or len(value) > 2000 or not value.isascii() or not value.isprintable():
        raise NotAModel(wanted)
    try:
        url = urlsplit(value)
        port = url.port
    except ValueError:
        raise NotAModel(wanted) from None
    if url.scheme not in ("http", "https") or not url.hostname or not _HOST.fullmatch(url.hostname) or port == 0:
        raise NotAModel(wanted)
    if url.username is not None or url.password is not None or url.query or url.fragment or " " in url.path:
        raise NotAModel(f"{wanted}; without user, password, query or fragment: keys are kept in files on the node")
    return url


def _number(given: Mapping[str, Any], name: str, default: float, low: float, high: float) -> float:
    value = given.get(name, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise NotAModel(f"`{name}` in {FILE} must be a number from {low:g} to {high:g}")
    return value
