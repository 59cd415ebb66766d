"""Model files that lie on this machine: sent to the control plane before the manifest that names them.

A source ``file:weights.gguf`` is relative to the manifest. Where that file exists here, it is uploaded by its SHA-256
and the manifest carries the digest; where it does not, the manifest is sent as it is, and the control plane looks for
the file on its own disk.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from fleetctl import screen
from fleetctl.client import Client
from fleetctl.manifests import Document
from slmfleet.errors import UsageError

_PIECE = 1 << 20


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
        if declared and declared != digest:
            raise UsageError(f"{document.place(pointer + '/sha256')}: {path} has the SHA-256 {digest}, not {declared}")
        _upload(client, path, digest)
        _file(value, pointer)["sha256"] = digest
    return value


def local_files(document: Document) -> Iterator[tuple[str, Path]]:
    """Pointers to the files of a Model manifest whose ``file:`` source exists on this machine, with their paths."""
    if document.kind != "Model":
        return
    spec = document.value.get("spec")
    variants = spec.get("variants") if isinstance(spec, dict) else None
    for v, variant in enumerate(variants if isinstance(variants, list) else ()):
        files = variant.get("files") if isinstance(variant, dict) else None
        for f, file in enumerate(files if isinstance(files, list) else ()):
            source = file.get("source") if isinstance(file, dict) else None
            if not isinstance(source, str) or not source.startswith("file:"):
                continue
            path = document.folder / Path(source.removeprefix("file:").removeprefix("//")).expanduser()
            if path.is_file():
                yield f"/spec/variants/{v}/files/{f}", path


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
