"""The words in which the rest of agentd speaks with the model host. Plain values; no runtime is imported here."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, NamedTuple, Protocol


class ModelKey(NamedTuple):
    """Names one loadable thing: one worker process at most exists per key."""

    model: str
    version: str
    variant: str

    def __str__(self) -> str:
        return f"{self.model}@{self.version}/{self.variant}"


@dataclass(frozen=True, slots=True)
class RuntimeOptions:
    """How one model is loaded. 0, "" and None leave a thing to the node's settings, which also cap it."""

    threads: int = 0
    # Requests that one worker serves at once; each slot costs a whole context of memory.
    slots: int = 0
    # Longest run of prompt tokens between two looks at a cancellation.
    batch_tokens: int = 0
    # Layers on an accelerator; -1 = what the backend finds best.
    gpu_layers: int | None = None
    # Pin the weights in memory.
    lock_memory: bool | None = None
    # Type of the key-value cache, such as "q8_0".
    kv_type: str = ""
    # "distribute" or "isolate", on machines with several memory nodes.
    numa: str = ""


@dataclass(frozen=True, slots=True)
class LoadableModel:
    """A variant whose files are verified on disk. ``entry`` is the GGUF file, or the folder for onnx-genai."""

    key: ModelKey
    format: str
    entry: Path
    size_bytes: int
    # Context the worker is loaded with, in tokens; 0 = the host's default. Never "the model's full context".
    context_tokens: int = 0
    # Loaded at start and never unloaded for idleness.
    warm: bool = False
    # Seconds loaded after the last request; None = the host's default, 0 = at once, -1 = for ever.
    keep_alive_s: float | None = None
    # 0 to 100, greater is kept longer.
    priority: int = 50
    runtime: RuntimeOptions = RuntimeOptions()
    # Instructions that are read into the prefix cache as soon as a warm model is loaded.
    warm_prompts: tuple[str, ...] = ()


class ModelState(StrEnum):
    """Life of one model on this node. The transitions stand in ``agentd/models/owner.py``."""

    UNLOADED = "unloaded"
    LOADING = "loading"
    READY = "ready"
    STOPPING = "stopping"
    # Crashed lately; the next start waits for the back-off to pass.
    BACKING_OFF = "backing_off"


@dataclass(frozen=True, slots=True)
class ModelStatus:
    """What the host says of one model. Advisory: true when it was read."""

    key: ModelKey
    state: ModelState
    format: str
    pid: int | None
    memory_bytes: int
    in_flight: int
    queued: int
    # Why the model is not ready, or why it last failed; "" when all is well.
    reason: str
    loaded_at_s: float | None
    load_seconds: float | None
    crashes: int
    # True once it crashed so often in a row that somebody should look; ``log_lines``: the last words of its worker.
    degraded: bool = False
    log_lines: tuple[str, ...] = ()
    # Why it is far slower than it was ("" when it is not), and what its worker may take (0: no limit).
    thrashing: str = ""
    limit_bytes: int = 0


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """One generation. ``body`` is an OpenAI chat-completions request, already validated and completed by the caller:
    ``messages`` with the agent's instructions first, ``max_tokens``, sampling options, ``stop``, ``response_format``.
    With ``prompt`` (text) in place of ``messages`` the model goes on from that text, without a chat template.
    """

    key: ModelKey
    body: Mapping[str, Any]
    # Seconds from now until the whole answer must be there.
    timeout_s: float = 120.0
    # Seconds the request may wait for its turn.
    queue_timeout_s: float = 30.0
    priority: int = 50
    keep_alive_s: float | None = None


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of the answer: ``delta`` is OpenAI's ``choices[0].delta`` object, ``tokens`` how many it stands for."""

    delta: Mapping[str, Any]
    tokens: int = 1
    logprobs: Any = None


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds that a request spent in each stage; ``load_s`` is 0 for a model that was ready."""

    queue_s: float = 0.0
    load_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Done:
    """The end of the answer; always the last item of a stream that did not raise."""

    finish_reason: str
    prompt_tokens: int
    output_tokens: int
    # Prompt tokens that were found in the prefix cache.
    cached_tokens: int = 0
    timings: Timings = field(default_factory=Timings)


@dataclass(frozen=True, slots=True)
class Vectors:
    """The answer to an embedding request: one vector for each input, in their order."""

    values: Sequence[Sequence[float]]
    prompt_tokens: int


class Refused(Exception):
    """The request can't be served now, or never. Nothing of it has run.

    ``status`` is the HTTP status (400, 404, 429, 503), ``code`` the OpenAI-style error code such as
    ``context_length_exceeded``, ``retry_after_s`` how long to wait before it makes sense to ask again.
    """

    def __init__(self, status: int, code: str, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.retry_after_s = retry_after_s


class GenerationFailed(Exception):
    """The worker died, hung or reported an error while it served this request. ``code`` as in Refused."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


class ModelHost(Protocol):
    """What the API, the relay, convergence and telemetry need of the model host."""

    def generate(self, request: GenerateRequest) -> AsyncIterator[Chunk | Done]:
        """Stream one answer. Closing the iterator cancels the work in the worker.

        Raises Refused before anything ran, GenerationFailed after.
        """
        ...

    def bursts(self, request: GenerateRequest) -> AsyncGenerator[Sequence[Chunk | Done], None]:
        """As ``generate``, but each time all items that are there, at least one: for readers that can pass several on
        together. Close it."""
        ...

    async def embed(self, request: GenerateRequest, inputs: Sequence[str]) -> Vectors:
        """Vectors for the inputs; ``request.body`` is not used. Raises as ``generate`` does."""
        ...

    async def knows_tools(self, key: ModelKey) -> bool | None:
        """Whether the model's chat template lists tools; None where its files do not say, as for a server elsewhere."""
        ...

    async def load(self, key: ModelKey) -> None:
        """Load now; returns when the model is ready. Raises Refused."""
        ...

    async def unload(self, key: ModelKey) -> None:
        """Unload as soon as nobody uses the model; returns when its memory is back. Raises Refused."""
        ...

    def set_models(self, models: Sequence[LoadableModel]) -> None:
        """The full set of models that may be loaded from now on. Others are drained and unloaded; ``warm`` ones are
        loaded. Calling it twice with the same set does nothing the second time."""
        ...

    def status(self) -> Sequence[ModelStatus]:
        """All models of the set, loaded or not."""
        ...

    async def run(self) -> None:
        """Serve until cancelled; then stop every worker in order."""
        ...
