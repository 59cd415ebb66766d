"""Fetch one file over mutual TLS, resuming where the last attempt stopped, and verify it while it streams in.

Blocking (``http.client`` in a thread): one download at a time is what a device wants, and no HTTP client library has
to stay in the daemon's memory.
"""

from __future__ import annotations

import errno
import hashlib
import http.client
import os
import socket
import ssl
from pathlib import Path
from typing import BinaryIO
from urllib.parse import urlsplit

from agentd.artifacts.attempt import Cancelled, Fetched, FetchFailed, Stop
from agentd.identity.files import SERVER_NAME

_CHUNK = 1 << 18
CONNECT_S = 10.0
STALL_S = 30.0


class _PinnedConnection(http.client.HTTPSConnection):
    """HTTPS whose certificate must carry the control plane's name, whatever address it is reached at."""

    def __init__(self, host: str, port: int, context: ssl.SSLContext, stop: Stop) -> None:
        super().__init__(host, port, timeout=STALL_S, context=context)
        self._pinned = context
        self._stop = stop

    def connect(self) -> None:
        plain = socket.create_connection((self.host, self.port), CONNECT_S)
        self._stop.watch(plain)
        plain.settimeout(STALL_S)
        try:
            self.sock = self._pinned.wrap_socket(plain, server_hostname=SERVER_NAME)
            self._stop.watch(self.sock)
        except BaseException:
            plain.close()
            raise


def fetch(
    base_url: str,
    sha256: str,
    size_bytes: int,
    partial: Path,
    context: ssl.SSLContext,
    stop: Stop,
) -> Fetched:
    """Bring ``{base_url}/artifacts/{sha256}`` into ``partial``.

    Progress is the size of ``partial``. Raises FetchFailed (the partial file is gone if its bytes were wrong or
    the disk is full) or Cancelled.
    """
    try:
        return _fetch(base_url, sha256, size_bytes, partial, context, stop)
    except OSError as error:
        if stop.is_set():
            raise Cancelled from error
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            partial.unlink(missing_ok=True)
            raise FetchFailed("DiskFull", f"the disk became full while {sha256[:12]} was fetched") from error
        raise FetchFailed("FetchFailed", f"cannot fetch {sha256[:12]} from {base_url}: {error}") from error
    except http.client.HTTPException as error:
        raise FetchFailed("FetchFailed", f"cannot fetch {sha256[:12]} from {base_url}: {error!r}") from error


def _fetch(
    base_url: str,
    sha256: str,
    size_bytes: int,
    partial: Path,
    context: ssl.SSLContext,
    stop: Stop,
) -> Fetched:
    with partial.open("ab+") as file:
        os.chmod(file.fileno(), 0o600)
        digest = _hash_so_far(file, size_bytes, stop)
        start = file.seek(0, os.SEEK_END)
        if start < size_bytes or size_bytes == 0:
            url = urlsplit(base_url)
            connection = _PinnedConnection(url.hostname or "", url.port or 443, context, stop)
            try:
                response = _ask(connection, f"{url.path.rstrip('/')}/artifacts/{sha256}", start)
                if response.status == http.client.OK and start:
                    # The server can't resume: from the start again.
                    file.truncate(0)
                    digest, start = hashlib.sha256(), 0
                _check_status(response, sha256, partial, start)
                _stream(response, file, digest, start, size_bytes, stop)
            finally:
                connection.close()
        file.flush()
        os.fsync(file.fileno())
        length = file.tell()
    if size_bytes and length < size_bytes:
        if stop.is_set():
            raise Cancelled
        raise FetchFailed("FetchFailed", f"the connection ended at {length} of {size_bytes} bytes of {sha256[:12]}")
    if digest.hexdigest() != sha256:
        partial.unlink(missing_ok=True)
        raise FetchFailed(
            "DigestMismatch", f"the bytes of {sha256[:12]} have the digest {digest.hexdigest()[:12]}: they were deleted"
        )
    return Fetched(resumed_from=start)


def _hash_so_far(file: BinaryIO, size_bytes: int, stop: Stop) -> hashlib._Hash:
    """The hash over the partial file; one that is longer than it may be is emptied."""
    digest = hashlib.sha256()
    if size_bytes and os.fstat(file.fileno()).st_size > size_bytes:
        file.truncate(0)
    file.seek(0)
    while chunk := file.read(_CHUNK):
        if stop.is_set():
            raise Cancelled
        digest.update(chunk)
    return digest


def _ask(connection: _PinnedConnection, path: str, start: int) -> http.client.HTTPResponse:
    headers = {"Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
    connection.request("GET", path, headers=headers)
    return connection.getresponse()


def _check_status(response: http.client.HTTPResponse, sha256: str, partial: Path, start: int) -> None:
    if response.status == http.client.OK:
        return
    if response.status == http.client.PARTIAL_CONTENT:
        begins = (response.getheader("Content-Range") or "").removeprefix("bytes ").partition("-")[0]
        if start and begins == str(start):
            return
        partial.unlink(missing_ok=True)
        raise FetchFailed("FetchFailed", f"the server answered another range of {sha256[:12]} than was asked for")
    if response.status == http.client.REQUESTED_RANGE_NOT_SATISFIABLE:
        partial.unlink(missing_ok=True)
        raise FetchFailed("FetchFailed", f"the server has fewer bytes of {sha256[:12]} than are here: starting anew")
    if response.status == http.client.NOT_FOUND:
        raise FetchFailed("NotFound", f"the control plane does not have the file {sha256[:12]} (yet)")
    raise FetchFailed("FetchFailed", f"the artifact store answered {response.status} for {sha256[:12]}")


def _stream(
    response: http.client.HTTPResponse,
    file: BinaryIO,
    digest: hashlib._Hash,
    start: int,
    size_bytes: int,
    stop: Stop,
) -> None:
    done = start
    while chunk := response.read1(_CHUNK):
        if stop.is_set():
            raise Cancelled
        done += len(chunk)
        if size_bytes and done > size_bytes:
            file.truncate(0)
            raise FetchFailed("DigestMismatch", f"the server sent more than the {size_bytes} bytes that were announced")
        file.write(chunk)
        digest.update(chunk)
