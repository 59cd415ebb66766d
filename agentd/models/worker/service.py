"""What a worker does with each message.

Threads: the main thread reads, so that Cancel, Stop and end of file are always seen; one thread per slot drives the
backend; one sends heartbeats while there is work, and sleeps otherwise.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from agentd.models.backends import load_backend
from agentd.models.backends.base import Backend, BackendFailure, Finish, LoadSpec, RequestError
from agentd.models.wire import FrameTooLarge
from agentd.models.worker.channel import Channel
from slmfleet.v1 import worker_pb2
from slmfleet.v1.worker_pb2 import WorkerReply, WorkerRequest

HEARTBEAT_S = 1.0


class Task:
    """One running request: the backend's Sink."""

    __slots__ = ("_channel", "_role_sent", "cancelled", "id", "tokens")

    def __init__(self, channel: Channel, request_id: int) -> None:
        self.id = request_id
        self.tokens = 0
        self.cancelled = False
        self._channel = channel
        self._role_sent = False

    def text(self, text: str, tokens: int = 1, logprobs: Any = None) -> bool:
        if not self._role_sent:
            return self.delta({"content": text}, tokens, logprobs)
        self.tokens += tokens
        chunk = WorkerReply.Chunk(text=text, tokens=tokens, logprobs=_json(logprobs))
        self._channel.send(WorkerReply(request_id=self.id, chunk=chunk))
        return self.cancelled

    def delta(self, delta: Mapping[str, Any], tokens: int = 1, logprobs: Any = None) -> bool:
        if not self._role_sent:
            self._role_sent = True
            delta = {"role": "assistant", **delta}
        self.tokens += tokens
        chunk = WorkerReply.Chunk(delta=_json(delta), tokens=tokens, logprobs=_json(logprobs))
        self._channel.send(WorkerReply(request_id=self.id, chunk=chunk))
        return self.cancelled

    def progress(self, tokens: int) -> bool:
        self.tokens += tokens
        return self.cancelled


class Service:
    """The life of one worker process."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._backend: Backend | None = None
        # Request ids that run or wait; written by the main thread and the slots, each entry by one at a time.
        self._tasks: dict[int, Task] = {}
        self._work: queue.SimpleQueue[tuple[Task, WorkerRequest]] = queue.SimpleQueue()
        self._busy = threading.Event()

    def run(self) -> None:
        """Read messages until the end; then end the process."""
        threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()
        try:
            while (request := self._channel.receive()) is not None:
                self._handle(request)
        except OSError:
            pass
        except FrameTooLarge as error:
            print(error, file=sys.stderr, flush=True)
        self._end(0)

    def _handle(self, request: WorkerRequest) -> None:
        match request.WhichOneof("message"):
            case "load":
                threading.Thread(target=self._load, args=(request,), name="load", daemon=True).start()
            case "generate" | "embed":
                task = self._tasks[request.request_id] = Task(self._channel, request.request_id)
                self._busy.set()
                self._work.put((task, request))
            case "cancel":
                if task_of := self._tasks.get(request.request_id):
                    task_of.cancelled = True
            case "stats":
                stats = dict(self._backend.stats()) if self._backend else {}
                self._channel.send(
                    WorkerReply(request_id=request.request_id, heartbeat=WorkerReply.Heartbeat(stats=stats))
                )
            case "stop":
                self._end(0)

    def _load(self, request: WorkerRequest) -> None:
        load = request.load
        started = time.monotonic()
        try:
            backend = load_backend(load.backend)
            loaded = backend.load(_spec(load))
        except Exception as error:  # noqa: BLE001 - any failure to load ends this process with its reason
            traceback.print_tb(error.__traceback__)
            self._fail_and_end(str(error) or type(error).__name__)
            return
        self._backend = backend
        for number in range(loaded.slots):
            threading.Thread(target=self._serve, name=f"slot-{number}", daemon=True).start()
        ready = WorkerReply.Ready(
            slots=loaded.slots,
            context_tokens=loaded.context_tokens,
            load_seconds=time.monotonic() - started,
        )
        self._channel.send(WorkerReply(ready=ready))

    def _fail_and_end(self, message: str) -> None:
        self._channel.send(WorkerReply(failed=WorkerReply.Failed(code="model_load_failed", message=message[:2000])))
        self._channel.drain(1.0)
        self._end(1)

    def _serve(self) -> None:
        assert self._backend is not None
        while True:
            task, request = self._work.get()
            reply = _run(self._backend, task, request)
            del self._tasks[task.id]
            self._channel.send(reply)

    def _beat(self) -> None:
        while True:
            self._busy.wait()
            self._busy.clear()
            if not self._tasks:
                continue
            # Set again first: a request that comes while this thread sleeps must not be forgotten.
            self._busy.set()
            time.sleep(HEARTBEAT_S)
            progress = [
                worker_pb2.WorkerReply.Progress(request_id=task.id, tokens=task.tokens)
                for task in list(self._tasks.values())
            ]
            if progress:
                self._channel.send(WorkerReply(heartbeat=WorkerReply.Heartbeat(progress=progress)))

    def _end(self, status: int) -> None:
        """End now. Not by returning: destructors of runtimes are known to deadlock."""
        if self._backend is not None:
            self._backend.stop()
        sys.stderr.flush()
        os._exit(status)


def _run(backend: Backend, task: Task, request: WorkerRequest) -> WorkerReply:
    """Serve one request; its last reply."""
    if task.cancelled:
        return WorkerReply(request_id=task.id, done=WorkerReply.Done(finish_reason="cancelled"))
    try:
        if request.WhichOneof("message") == "embed":
            vectors, tokens = backend.embed(list(request.embed.input), task)
            done = _done(Finish("stop", tokens, 0), task.cancelled)
            # After a cancellation some may be missing, and nobody waits for the others.
            if done.finish_reason == "stop":
                done.embeddings.extend(WorkerReply.Vector(values=values) for values in vectors)
        else:
            done = _done(backend.generate(json.loads(request.generate.body), task), task.cancelled)
        return WorkerReply(request_id=task.id, done=done)
    except RequestError as error:
        failed = WorkerReply.Failed(
            status=error.status, code=error.code, message=error.message, retry_after_seconds=error.retry_after_s or 0.0
        )
    except BackendFailure as error:
        failed = WorkerReply.Failed(code="generation_failed", message=str(error)[:2000])
    except Exception as error:  # noqa: BLE001 - one request's failure must not end the others
        # Without the exception's text, which may quote the prompt: that goes to the caller only.
        traceback.print_tb(error.__traceback__)
        failed = WorkerReply.Failed(code="generation_failed", message=f"{type(error).__name__}: {error}"[:2000])
    return WorkerReply(request_id=task.id, failed=failed)


def _done(finish: Finish, cancelled: bool) -> WorkerReply.Done:
    return WorkerReply.Done(
        finish_reason="cancelled" if cancelled else finish.reason,
        prompt_tokens=finish.prompt_tokens,
        output_tokens=finish.output_tokens,
        cached_tokens=finish.cached_tokens,
        prefill_seconds=finish.prefill_s,
        decode_seconds=finish.decode_s,
    )


def _spec(load: WorkerRequest.Load) -> LoadSpec:
    return LoadSpec(
        entry=Path(load.entry),
        context_tokens=load.context_tokens,
        threads=load.threads,
        slots=load.slots,
        prefill_chunk=load.prefill_chunk,
        kv_type=load.kv_type,
        gpu_layers=load.gpu_layers,
        lock_memory=load.lock_memory,
        numa=load.numa,
        adapters={adapter.name: Path(adapter.path) for adapter in load.adapters},
        draft=Path(load.draft) if load.draft else None,
    )


def _json(value: Any) -> bytes:
    return b"" if value is None else json.dumps(value, ensure_ascii=False).encode()
