"""REST, spoken by a program: JSON in, JSON out, problems as exceptions, pages joined."""

from __future__ import annotations

import contextlib
import ssl
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import httpx2

from fleetctl.errors import Problem, Unreachable, problem
from slmfleet import __version__
from slmfleet.errors import UsageError

API = "/api/v1"
_PAGE = 500


class Client:
    """One control plane and one key. All methods raise Problem (the server said no) or Unreachable."""

    def __init__(self, server: str, token: str | None, ca_file: Path | None = None, timeout_s: float = 30.0) -> None:
        self.server = server.rstrip("/")
        # What every request carries; for programs that speak to the same server in their own way.
        headers = {"user-agent": f"fleetctl/{__version__}"}
        if token:
            headers["authorization"] = f"Bearer {token}"
        self.headers = headers
        # A proxy of the environment is for the internet; the control plane's address was given on purpose.
        self._http = httpx2.Client(
            base_url=self.server, headers=headers, timeout=timeout_s, trust_env=False, verify=_verify(ca_file)
        )

    def __enter__(self) -> Client:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._http.close()

    def call(
        self, method: str, path: str, *, params: Mapping[str, Any] | None = None, body: Any = None
    ) -> dict[str, Any]:
        """One exchange under /api/v1; an empty answer is ``{}``."""
        given = {key: value for key, value in (params or {}).items() if value is not None}
        with self._reaching():
            response = self._http.request(method, API + path, params=given, json=body)
        return self._answer(response)

    def get(self, path: str, **params: Any) -> dict[str, Any]:
        """One object."""
        return self.call("GET", path, params=params)

    def find(self, path: str) -> dict[str, Any] | None:
        """One object; None when it does not exist."""
        try:
            return self.get(path)
        except Problem as error:
            if error.status == 404:
                return None
            raise

    def items(self, path: str, limit: int | None = None, **params: Any) -> Iterator[dict[str, Any]]:
        """The objects of a collection, over all its pages, at most ``limit`` of them."""
        cursor: str | None = None
        left = limit
        while left is None or left > 0:
            page = self.get(path, limit=min(_PAGE, left or _PAGE), cursor=cursor, **params)
            found = page.get("items", [])[:left]
            yield from found
            cursor = page.get("nextCursor")
            left = None if left is None else left - len(found)
            if not cursor:
                return

    def apply(
        self, documents: Sequence[Mapping[str, Any]], dry_run: bool = False, allow_unmatched: bool = False
    ) -> list[dict[str, Any]]:
        """Apply manifests, all or none; one result ``{kind, name, action, warnings}`` a document. ``allow_unmatched``:
        a selector that matches no node is a warning instead of a Problem."""
        answer = self.call(
            "POST",
            "/apply",
            params={"dryRun": "true" if dry_run else "false", "allowUnmatched": "true" if allow_unmatched else None},
            body={"documents": list(documents)},
        )
        return list(answer.get("results", []))

    def upload(self, sha256: str, content: Iterator[bytes] | BinaryIO, size: int) -> None:
        """Send the bytes of one file to the server's artifact store."""
        headers = {"content-length": str(size), "content-type": "application/octet-stream"}
        with self._reaching():
            response = self._http.put(f"{API}/uploads/{sha256}", content=content, headers=headers, timeout=300.0)
        self._answer(response)

    @contextlib.contextmanager
    def chat(self, body: Mapping[str, Any], timeout_s: float) -> Iterator[httpx2.Response]:
        """A streamed /v1/chat/completions; the response's lines are yet to be read."""
        with self._reaching():
            with self._http.stream("POST", "/v1/chat/completions", json=body, timeout=timeout_s) as response:
                if response.is_error:
                    response.read()
                    self._answer(response)
                yield response

    def _answer(self, response: httpx2.Response) -> dict[str, Any]:
        try:
            body = response.json() if response.content else {}
        except ValueError:
            body = None
        if response.is_error:
            if response.status_code == 401:
                raise Problem(401, f"{self.server} does not accept this API key: check --token or FLEETCTL_TOKEN")
            raise problem(response.status_code, body, response.reason_phrase)
        if not isinstance(body, dict):
            raise Unreachable(
                f"what answers at {self.server} is no slmfleet control plane (its answer is no JSON object)"
            )
        return body

    @contextlib.contextmanager
    def _reaching(self) -> Iterator[None]:
        try:
            yield
        except httpx2.TimeoutException:
            raise Unreachable(f"{self.server} did not answer in time: try again, or look at the server's log") from None
        except (httpx2.InvalidURL, httpx2.UnsupportedProtocol):
            raise UsageError(f"{self.server!r} is no address of a server: write http://host:port") from None
        except httpx2.TransportError as error:
            reason = str(error) or type(error).__name__
            raise Unreachable(
                f"cannot reach the control plane at {self.server} ({reason}): is it running, and is --server right?"
            ) from None


def _verify(ca_file: Path | None) -> ssl.SSLContext | bool:
    if ca_file is None:
        return True
    try:
        return ssl.create_default_context(cafile=str(ca_file))
    except OSError as error:
        raise UsageError(f"cannot read the certificates in {ca_file}: {error.strerror or error}") from None
