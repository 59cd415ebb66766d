"""Free memory that the C library holds, given back to the system."""

from __future__ import annotations

import ctypes


def give_back() -> None:
    """Return free memory to the system, where the C library can (glibc's malloc_trim); a millisecond or two."""
    library = ctypes.CDLL(None)
    if hasattr(library, "malloc_trim"):
        library.malloc_trim(0)
