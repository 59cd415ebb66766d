"""How many bytes ggml's tensor types take: ``enum ggml_type`` and the blocks of
https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

# Type number: (values in a block, bytes of a block).
BLOCKS = {
    0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34), 9: (32, 40), 10: (256, 84),
    11: (256, 110), 12: (256, 144), 13: (256, 176), 14: (256, 210), 15: (256, 292), 16: (256, 66), 17: (256, 74),
    18: (256, 98), 19: (256, 50), 20: (32, 18), 21: (256, 110), 22: (256, 82), 23: (256, 136), 24: (1, 1), 25: (1, 2),
    26: (1, 4), 27: (1, 8), 28: (1, 8), 29: (256, 56), 30: (1, 2), 34: (256, 54), 35: (256, 66), 39: (32, 17),
}  # fmt: skip


def tensor_bytes(shape: Sequence[int], kind: int) -> int | None:
    """Bytes of a tensor of type number ``kind``; None for a type that is not known here."""
    if kind not in BLOCKS:
        return None
    values, size = BLOCKS[kind]
    return -(-math.prod(shape) // values) * size
