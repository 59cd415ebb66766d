"""Model files that lie on this machine: sent to the control plane before the manifest that names them.

A source ``file:weights.gguf`` is relative to the manifest. Where that file exists here, it is uploaded by its SHA-256
and the manifest carries the digest; where it does not, the manifest is sent as it is, and the control plane looks for
the file on its own disk.
"""

from __future__ import annotations

import copy
import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from fleetctl import screen
from fleetctl.client import Client
from fleetctl.manifests import Document
from slmfleet.errors import UsageError

_PIECE = 1 << 20
_SHA256 = re.compile(r"[0-9a-fA-F]{64}")


def check_digests(documents: list[Document]) -> None:
    """Raises UsageError for a ``sha256`` of a Model's file that is no text of 64 hex digits.

    YAML reads digits without quotes as a number: a digest of zeros as 0, which must not pass for "none given".
    """
    for document in documents:
        for pointer, file in _files(document):
            if "sha256" not in file:
                continue
            value, place = file["sha256"], document.place(f"{pointer}/sha256")
            if value is None:
                raise UsageError(f"{place}: sha256 is empty: write 64 hex digits, or remove the line")
            if not isinstance(value, str):
                raise UsageError(f"{place}: sha256 is no text (YAML reads bare digits as a number): quote it")
            if not _SHA256.fullmatch(value):
                raise UsageError(f"{place}: {value!r} is no SHA-256: write 64 hex digits, and quote it")


def send_local_files(client: Client, documents: list[Document]) -> list[dict[str, Any]]:
    """Upload what the documents need from this machine; return their values with the digests filled in."""
    return [_send(client, document) for document in documents]


def _send(client: Client, document: Document) -> dict[str, Any]:
    found = list(local_files(document))
    if not found:
        return document.value
    value = copy.deepcopy(document.value)
    for pointer, path in found:
        declared = _file(value, pointer).get("sha256")
        digest = _sha256(path)
        if declared is not None and declared.lower() != digest:
            raise UsageError(f"{document.place(pointer + '/sha256')}: {path} has the SHA-256 {digest}, not {declared}")
        _upload(client, path, digest)
        _file(value, pointer)["sha256"] = digest
    return value


def local_files(document: Document) -> Iterator[tuple[str, Path]]:
    """Pointers to the files of a Model manifest whose ``file:`` source exists on this machine, with their paths."""
    for pointer, file in _files(document):
        source = file.get("source")
        if not isinstance(source, str) or not source.startswith("file:"):
            continue
        path = document.folder / Path(source.removeprefix("file:").removeprefix("//")).expanduser()
        if path.is_file():
            yield pointer, path


def _files(document: Document) -> Iterator[tuple[str, dict[str, Any]]]:
    """Pointers to the files of a Model manifest, with what it says of each; what has another shape is the server's
    to refuse."""
    spec = document.value.get("spec") if document.kind == "Model" else None
    variants = spec.get("variants") if isinstance(spec, dict) else None
    for v, variant in enumerate(variants if isinstance(variants, list) else ()):
        files = variant.get("files") if isinstance(variant, dict) else None
        for f, file in enumerate(files if isinstance(files, list) else ()):
            if isinstance(file, dict):
                yield f"/spec/variants/{v}/files/{f}", file


def _file(value: dict[str, Any], pointer: str) -> dict[str, Any]:
    _, _, _, variant, _, file = pointer.split("/")
    found: dict[str, Any] = value["spec"]["variants"][int(variant)]["files"][int(file)]
    return found


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None


def _upload(client: Client, path: Path, digest: str) -> None:
    size = path.stat().st_size
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    console = screen.err()
    with (
        path.open("rb") as file,
        Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar,
    ):
        task = bar.add_task(path.name, total=size)

        def pieces() -> Iterator[bytes]:
            while piece := file.read(_PIECE):
                bar.advance(task, len(piece))
                yield piece

        client.upload(digest, pieces(), size)
