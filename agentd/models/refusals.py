"""Why a request is turned away, and when to ask again. Pure: facts in, the exception out."""

from __future__ import annotations

from agentd.models import admission
from agentd.models.types import ModelKey, Refused

# A model that found no memory is asked for again after this long.
ASK_AGAIN_S = 30.0


def backing_off(key: ModelKey, reason: str, wait_s: float) -> Refused:
    """The model failed lately."""
    wait_s = max(1.0, wait_s)
    return Refused(503, "model_backing_off", f"{key} can't be served for another {wait_s:.0f} s: {reason}", wait_s)


def no_memory(reason: str) -> Refused:
    """The planner said no."""
    return Refused(503, "insufficient_memory", reason, ASK_AGAIN_S)


def removed(key: ModelKey) -> Refused:
    """The desired state dropped the model."""
    return Refused(404, "model_not_found", f"{key} is being removed from this node")


def restarting(key: ModelKey) -> Refused:
    """Its owner failed: a bug, which costs this model a moment."""
    return Refused(503, "model_restarting", f"{key} is being restarted after an internal error", 2.0)


def too_slow(key: ModelKey, what: str, timeout_s: float) -> Refused:
    """``what``: "loaded" or "unloaded"."""
    return Refused(503, "timeout", f"{key} was not {what} within {timeout_s:g} s; see its status for why", 10.0)


def shutting_down() -> Refused:
    """The daemon ends."""
    return Refused(503, "shutting_down", "the node is shutting down; ask again later", 10.0)


def queue_is_full(key: ModelKey, waiting: int) -> str:
    """The beginning of the sentence that ``busy`` or ``loading`` completes."""
    return f"{waiting} requests already wait for {key}"


def waited_too_long(key: ModelKey, waited_s: float) -> str:
    """Likewise."""
    return f"the request waited {waited_s:.0f} s for {key} without its turn"


def busy(what: str, waiting: int, slots: int, service_s: float | None, oldest_s: float) -> Refused:
    """The model serves as fast as it can."""
    wait = admission.retry_after_s(waiting + 1, slots, service_s, oldest_s)
    return Refused(429, "queue_full", f"{what}; ask again in {wait:.0f} s", wait)


def loading(what: str, loading_for_s: float | None, expected_s: float, ending: bool = False) -> Refused:
    """The model is not ready; ``loading_for_s`` None: it waits for memory, or for its last worker to be gone."""
    if ending:
        doing = "its last worker is being ended"
    elif loading_for_s is None:
        doing = "it waits for memory"
    else:
        doing = f"it has been loading for {loading_for_s:.0f} s"
    wait = max(1.0, expected_s - (loading_for_s or 0.0))
    return Refused(503, "model_loading", f"{what}: {doing}", wait)
