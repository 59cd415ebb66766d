"""``https://host/path`` and ``hf:org/repo[@revision]#path``, with Range, so that a broken download goes on.

The standard library's client is enough for a few long downloads, honours the usual proxy variables, and adds no
dependency; it runs in threads. Bytes gather in ``<sha256>.partial`` under an exclusive lock.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import http.client
import re
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from controlplane.artifacts.order import Order, SourceAway, SourceUnusable
from controlplane.artifacts.store import CHUNK_BYTES

_TIMEOUT_S = 30.0
# These answers may be better next time; all other 4xx will not.
_PASSING = (408, 425, 429)
_HF = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?#(?P<path>[^?#]+)")


async def fetch(order: Order) -> Path:
    """Download ``https://...``; the path of the complete, unchecked file."""
    return await download(order, order.source, {})


async def fetch_from_hugging_face(order: Order) -> Path:
    """Download ``hf:org/repo[@revision]#path`` as ``huggingface_hub`` addresses and authenticates it (``HF_ENDPOINT``,
    ``HF_TOKEN``)."""
    match = _HF.fullmatch(order.rest)
    if match is None:
        raise SourceUnusable(f"{order.source} is no file of a repository: write hf:org/repo@revision#path/of/file")
    try:
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers
    except ImportError:
        raise SourceUnusable(
            "hf: sources need the package huggingface-hub on the control plane: pip install 'slmfleet[hf]'"
        ) from None
    url = hf_hub_url(match["repo"], match["path"], revision=match["revision"])
    return await download(order, url, build_hf_headers())


async def download(order: Order, url: str, headers: Mapping[str, str]) -> Path:
    """Bring ``url`` to ``order.partial``, going on from where an earlier try ended."""
    with _locked(order) as file:
        response = await asyncio.to_thread(_open, order, url, headers, file)
        if response is None:
            return order.partial
        try:
            total = _total(response, file.tell())
            while await asyncio.to_thread(_copy, order, response, file):
                order.progress(file.tell(), total)
            if total is not None and file.tell() < total:
                raise SourceAway(f"{order.source} broke off after {file.tell()} of {total} bytes")
        finally:
            response.close()
    return order.partial


@contextlib.contextmanager
def _locked(order: Order) -> Iterator[BinaryIO]:
    """The partial file, at its end; one process at a time."""
    with order.partial.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
            raise SourceAway(f"{order.source} is being fetched by another process") from None
        yield file


def _open(order: Order, url: str, headers: Mapping[str, str], file: BinaryIO) -> Any:
    """The response, positioned at the end of ``file``; None when ``file`` holds everything already."""
    have = file.tell()
    request = urllib.request.Request(url, headers={"Accept-Encoding": "identity"})
    for name, value in headers.items():
        # "Unredirected": a token is for the host it was meant for, not for the one that it points to.
        request.add_unredirected_header(name, value)
    if have:
        request.add_header("Range", f"bytes={have}-")
    try:
        response = urllib.request.urlopen(request, timeout=_TIMEOUT_S)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE and have:
            return None
        if error.code >= 500 or error.code in _PASSING:
            raise SourceAway(f"{order.source} can't be fetched now: the server answers {error.code}") from None
        raise SourceUnusable(
            f"{order.source} can't be fetched: the server answers {error.code} {error.reason}"
        ) from None
    except (OSError, http.client.HTTPException) as error:
        raise SourceAway(f"{order.source} can't be reached: {_words(error)}") from None
    if have and response.status != http.HTTPStatus.PARTIAL_CONTENT:
        # The server knows no ranges: all of it comes again.
        file.truncate(0)
        file.seek(0)
    return response


def _copy(order: Order, response: Any, file: BinaryIO) -> int:
    try:
        chunk = response.read(CHUNK_BYTES)
    except (OSError, http.client.HTTPException) as error:
        raise SourceAway(f"{order.source} broke off after {file.tell()} bytes: {_words(error)}") from None
    file.write(chunk)
    file.flush()
    return len(chunk)


def _total(response: Any, have: int) -> int | None:
    length = response.headers.get("Content-Length")
    return have + int(length) if length and length.isdecimal() else None


def _words(error: Exception) -> str:
    reason = getattr(error, "reason", None)
    return str(reason or error) or type(error).__name__
