"""Which files may go, as a pure function: nothing that is needed, the longest unneeded first, no more than must."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Room:
    """What the disk allows. ``cache_bytes`` 0 = no bound of its own."""

    cache_bytes: int
    free_bytes: int
    reserve_bytes: int


def prune(
    sizes: Mapping[str, int], used_at: Mapping[str, int], needed: Set[str], incoming_bytes: int, room: Room
) -> list[str]:
    """Digests to delete so that ``incoming_bytes`` more fit, oldest use first; [] when all fits already.

    ``sizes`` are the files on disk. Unneeded files are a cache (a rollback finds its bytes there), so they stay while
    there is room for them.
    """
    spare = sorted((used_at.get(digest, 0), digest) for digest in sizes if digest not in needed)
    over_cache = sum(sizes.values()) + incoming_bytes - room.cache_bytes if room.cache_bytes else 0
    over_disk = incoming_bytes + room.reserve_bytes - room.free_bytes
    excess = max(over_cache, over_disk)
    victims = []
    for _, digest in spare:
        if excess <= 0:
            break
        victims.append(digest)
        excess -= sizes[digest]
    return victims


def refusal(needed_bytes: int, incoming_bytes: int, room: Room) -> tuple[str, str] | None:
    """(reason, sentence) when a download must not start: it would pass the cache's bound or the disk's reserve.

    ``needed_bytes``: all files that the desired state needs, ``incoming_bytes``: what this download still brings.
    """
    from slmfleet.units import format_size

    if room.cache_bytes and needed_bytes > room.cache_bytes:
        return (
            "CacheTooSmall",
            f"the models of this node need {format_size(needed_bytes)}, model_cache_bytes allows "
            f"{format_size(room.cache_bytes)}: raise it or assign less",
        )
    if incoming_bytes + room.reserve_bytes > room.free_bytes:
        return (
            "DiskFull",
            f"the disk has {format_size(room.free_bytes)} free; this download needs {format_size(incoming_bytes)} and "
            f"{format_size(room.reserve_bytes)} stay in reserve: free some space",
        )
    return None
