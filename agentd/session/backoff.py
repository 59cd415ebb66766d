"""When to connect again: exponential back-off with full jitter.

Full jitter (a uniform choice between nothing and the bound) spreads a fleet that lost its server at one moment evenly:
Marc Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015.
"""

from __future__ import annotations

BASE_S = 0.5
CAP_S = 30.0


def reconnect_delay_s(failures: int, chance: float) -> float:
    """Seconds to wait after ``failures`` attempts in a row that brought no link; ``chance`` is in [0, 1)."""
    if failures <= 0:
        return 0.0
    return chance * min(CAP_S, BASE_S * 2.0 ** min(failures, 32))


def invited_delay_s(seconds: float, chance: float) -> float:
    """Seconds to wait when the server said "come back in ``seconds``": never earlier, up to a fifth later."""
    return max(seconds, 0.0) * (1 + 0.2 * chance)
