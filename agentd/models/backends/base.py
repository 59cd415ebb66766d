"""The Protocol of a backend: everything that a worker asks of an inference runtime.

Calls block; each runs in a thread of the worker. A backend whose server is elsewhere (an upstream, a supervised
server) fits as well: ``load`` connects, ``stop`` lets go.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol


@dataclass(frozen=True, slots=True)
class LoadSpec:
    """What to load and how. ``context_tokens`` counts for each slot."""

    entry: Path
    context_tokens: int
    threads: int
    slots: int = 1
    prefill_chunk: int = 128
    kv_type: str = ""
    gpu_layers: int = -1
    lock_memory: bool = False
    # "", "distribute" or "isolate": placement on machines with several memory nodes.
    numa: str = ""
    # LoRA adapters: name -> path.
    adapters: Mapping[str, Path] | None = None
    draft: Path | None = None


@dataclass(frozen=True, slots=True)
class Loaded:
    """What was loaded: requests at once, and context of each in tokens."""

    slots: int
    context_tokens: int


@dataclass(frozen=True, slots=True)
class Finish:
    """How a generation ended."""

    reason: str
    prompt_tokens: int
    output_tokens: int
    cached_tokens: int = 0
    prefill_s: float = 0.0
    decode_s: float = 0.0


class RequestError(Exception):
    """The request is at fault and nothing of it ran. ``status``, ``code`` and ``retry_after_s`` as in
    ``types.Refused``."""

    def __init__(self, code: str, message: str, status: int = 400, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.status = status
        self.retry_after_s = retry_after_s


class BackendFailure(Exception):
    """The backend failed at a request, for a reason that it knows: the message is the sentence to tell."""


def context_exceeded(prompt_tokens: int, context_tokens: int) -> RequestError:
    """The one sentence for a prompt that does not fit."""
    return RequestError(
        "context_length_exceeded",
        f"the prompt has {prompt_tokens} tokens and this model's context holds {context_tokens}, the answer included; "
        "shorten the messages or use a model with a larger context",
    )


def input_too_long(index: int, tokens: int, context_tokens: int) -> RequestError:
    """The one sentence for an input of an embedding or classification that does not fit."""
    return RequestError(
        "context_length_exceeded",
        f"input {index} has {tokens} tokens and this model reads {context_tokens} at once; split it",
    )


def refuse_several(body: Mapping[str, Any]) -> None:
    """A request is one answer; whoever wants several (``n``) sends it several times, and the prefix is cached."""
    if body.get("n") not in (None, 1):
        raise RequestError("unsupported_value", "`n` can only be 1 for one run of a model")


class Sink(Protocol):
    """Where a generation goes. A True answer means: cancelled, stop as soon as you can."""

    def text(self, text: str, tokens: int = 1, logprobs: Any = None) -> bool:
        """A piece of the answer's text."""
        ...

    def delta(self, delta: Mapping[str, Any], tokens: int = 1, logprobs: Any = None) -> bool:
        """A piece that is no plain text: OpenAI's ``choices[0].delta``."""
        ...

    def progress(self, tokens: int) -> bool:
        """``tokens`` of the prompt were read since the last call."""
        ...


class Backend(Protocol):
    """One loaded model. The worker calls ``load`` once, then the others from up to ``Loaded.slots`` threads."""

    def load(self, spec: LoadSpec) -> Loaded:
        """Load the model. Any exception means that it can't be loaded; its text is the reason."""
        ...

    def generate(self, body: Mapping[str, Any], sink: Sink) -> Finish:
        """Serve one OpenAI chat-completions request. Raises RequestError if it is at fault."""
        ...

    def embed(self, inputs: Sequence[str], sink: Sink) -> tuple[list[list[float]], int]:
        """Vectors of the inputs, and their tokens. ``sink`` is told of progress only; after it said "cancelled" the
        vectors may be fewer. Raises RequestError where the model has none."""
        ...

    def count_tokens(self, text: str) -> int:
        """Tokens of ``text``, without a template."""
        ...

    def stats(self) -> Mapping[str, float]:
        """Numbers of the runtime, by name."""
        ...

    def stop(self) -> None:
        """Let go of what outlives the process (files, sockets). Memory needs no care: the process ends."""
        ...
