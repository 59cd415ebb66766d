"""One worker process seen from agentd: spawned, spoken to, watched, ended and reaped.

The process is spawned from the event loop's thread, because the kernel's parent-death signal follows the spawning
*thread*. It enters its cgroup before Python is started in it. Its end is reported once, after everything that it
sent was delivered.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from agentd.device.cgroups import Group
from agentd.models.wire import FrameProtocol, Serializable
from slmfleet.units import format_size
from slmfleet.v1 import worker_pb2

_STDERR_LINES = 20
_STDERR_LINE_CHARS = 300
# The socket of a dead process is at its end at once; this bounds the wait for a grandchild that holds it open.
_CLOSE_GRACE_S = 1.0
# Enters each cgroup named before "--", then becomes the worker. Written by the child itself, so before its exec.
_ENTER = 'while [ "$1" != -- ]; do echo 0 > "$1" || exit 97; shift; done; shift; exec "$@"'
CGROUP_FAILED = 97
# Of -1000 to 1000: workers are what the kernel takes first.
_OOM_SCORE = "500"


@dataclass(frozen=True, slots=True)
class Exit:
    """How a worker ended: its return code (negative: a signal), and its last lines of standard error."""

    code: int
    lines: tuple[str, ...] = ()
    # The memory limit that the kernel killed it for, in bytes; 0: it did not.
    over_limit_bytes: int = 0

    def __str__(self) -> str:
        if self.over_limit_bytes:
            return f"was killed by the kernel: it needed more than its limit of {format_size(self.over_limit_bytes)}"
        if self.code < 0:
            with contextlib.suppress(ValueError):
                return f"was killed by {signal.Signals(-self.code).name}"
        return "could not enter its cgroup" if self.code == CGROUP_FAILED else f"ended with exit status {self.code}"


class Worker(Protocol):
    """What an owner needs of its worker; tests put a fake here."""

    @property
    def pid(self) -> int: ...

    @property
    def limit_bytes(self) -> int:
        """Memory that it may take; 0 = no limit."""
        ...

    @property
    def is_watched(self) -> bool:
        """True if its owner has to see to the limit, since no cgroup does."""
        ...

    def send(self, message: Serializable) -> None:
        """Queue a WorkerRequest."""
        ...

    def kill(self) -> None:
        """End it now. Its end is reported like any other."""
        ...

    async def stop(self, grace_s: float) -> None:
        """Stop, then SIGTERM, then SIGKILL, ``grace_s`` apart; returns when it is gone."""
        ...


@dataclass(frozen=True, slots=True)
class Launch:
    """How to start one worker."""

    # A new folder that only this worker uses; removed when it has ended.
    folder: Path
    environment: Mapping[str, str]
    # The cgroup that the child enters; removed when it has ended.
    group: Group | None = None
    # Memory that it may take: what ``group`` enforces, or else its owner. 0 = no limit.
    limit_bytes: int = 0
    python: str = sys.executable


class WorkerProcess:
    """The real Worker."""

    def __init__(
        self, launch: Launch, on_reply: Callable[[worker_pb2.WorkerReply], None], on_exit: Callable[[Exit], None]
    ) -> None:
        self._launch = launch
        self._on_reply = on_reply
        self._on_exit = on_exit
        self._loop = asyncio.get_running_loop()
        self._lines: deque[str] = deque(maxlen=_STDERR_LINES)
        self._partial = b""
        self._ended = asyncio.Event()
        self._closed = False
        self._code: int | None = None
        ours, theirs = socket.socketpair()
        self._socket = ours
        with theirs:
            self._process = self._spawn(theirs)
        self._frames = FrameProtocol(lambda data: on_reply(worker_pb2.WorkerReply.FromString(data)), self._on_closed)
        self._stderr = self._process.stderr
        assert self._stderr is not None
        os.set_blocking(self._stderr.fileno(), False)
        self._loop.add_reader(self._stderr.fileno(), self._read_stderr)
        self._pidfd = os.pidfd_open(self._process.pid)
        self._loop.add_reader(self._pidfd, self._reap)

    def _spawn(self, theirs: socket.socket) -> subprocess.Popen[bytes]:
        launch = self._launch
        launch.folder.mkdir(mode=0o700, parents=True)
        worker = [launch.python, "-P", "-m", "agentd.models.worker", "--fd", str(theirs.fileno())]
        worker += ["--parent", str(os.getpid())]
        if launch.group:
            worker = ["/bin/sh", "-c", _ENTER, "sh", *map(str, launch.group.enter), "--", *worker]
        process = subprocess.Popen(
            worker,
            cwd=launch.folder,
            env=dict(launch.environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            pass_fds=(theirs.fileno(),),
            # A Ctrl-C at the terminal is for agentd, which ends its workers in order.
            start_new_session=True,
        )
        with contextlib.suppress(OSError):
            # When the device is out of memory, a model goes before agentd or anything that people use does.
            Path(f"/proc/{process.pid}/oom_score_adj").write_text(_OOM_SCORE)
        (launch.folder / "pid").write_text(f"{process.pid} {start_time(process.pid)}\n")
        return process

    @classmethod
    async def start(
        cls, launch: Launch, on_reply: Callable[[worker_pb2.WorkerReply], None], on_exit: Callable[[Exit], None]
    ) -> WorkerProcess:
        """Spawn and connect. Raises OSError if no process can be made."""
        worker = cls(launch, on_reply, on_exit)
        await worker._loop.create_connection(lambda: worker._frames, sock=worker._socket)
        return worker

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def limit_bytes(self) -> int:
        return self._launch.limit_bytes

    @property
    def is_watched(self) -> bool:
        return self._launch.group is None and bool(self._launch.limit_bytes)

    @property
    def group(self) -> Group | None:
        """Its cgroup."""
        return self._launch.group

    def send(self, message: Serializable) -> None:
        self._frames.send(message)

    def kill(self) -> None:
        if self._code is None:
            self._process.kill()

    async def stop(self, grace_s: float) -> None:
        self.send(worker_pb2.WorkerRequest(stop=worker_pb2.WorkerRequest.Stop()))
        for number in (signal.SIGTERM, signal.SIGKILL):
            if await self._gone_within(grace_s):
                return
            if self._code is None:
                self._process.send_signal(number)
        await self._ended.wait()

    async def _gone_within(self, seconds: float) -> bool:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._ended.wait()
        return self._ended.is_set()

    def _read_stderr(self) -> None:
        assert self._stderr is not None
        try:
            data = os.read(self._stderr.fileno(), 1 << 16)
        except BlockingIOError:
            return
        if not data:
            self._loop.remove_reader(self._stderr.fileno())
            return
        *lines, self._partial = (self._partial + data).split(b"\n")
        # A line without end must not grow for ever.
        self._partial = self._partial[-4 * _STDERR_LINE_CHARS :]
        for line in lines:
            if text := line.decode(errors="replace").strip():
                self._lines.append(text[:_STDERR_LINE_CHARS])

    def _on_closed(self, reason: str) -> None:
        self._closed = True
        if reason:
            self._lines.append(reason)
        if self._code is None:
            # Without its socket a worker is of no use; a healthy one ends by itself when it sees the end of file.
            self._process.kill()
        else:
            self._finish()

    def _reap(self) -> None:
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        self._code = self._process.wait()
        self._read_stderr()
        if self._closed:
            self._finish()
        else:
            self._loop.call_later(_CLOSE_GRACE_S, self._frames.close)

    def _finish(self) -> None:
        if self._ended.is_set():
            return
        self._ended.set()
        assert self._stderr is not None
        assert self._code is not None
        self._loop.remove_reader(self._stderr.fileno())
        self._stderr.close()
        shutil.rmtree(self._launch.folder, ignore_errors=True)
        self._on_exit(Exit(self._code, tuple(self._lines), self._leave_group()))

    def _leave_group(self) -> int:
        """Remove the cgroup; its memory limit, if that was what killed the worker."""
        group = self._launch.group
        if group is None:
            return 0
        limit = group.limits.memory_bytes if self._code == -signal.SIGKILL and group.oom_kills() else 0
        group.remove()
        return limit


def start_time(pid: int) -> str:
    """Start of a process in clock ticks since boot (field 22 of /proc/pid/stat): with the pid, a name for ever."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def reap_leftovers(run_dir: Path) -> list[int]:
    """End workers that an earlier agentd left in ``run_dir`` and remove their folders; the pids that were ended."""
    ended = []
    for folder in sorted(run_dir.glob("worker-*")):
        with contextlib.suppress(OSError, ValueError):
            pid, _, started = (folder / "pid").read_text().strip().partition(" ")
            if started and start_time(int(pid)) == started:
                os.kill(int(pid), signal.SIGKILL)
                ended.append(int(pid))
        shutil.rmtree(folder, ignore_errors=True)
    return ended


def resident_bytes(pid: int | None) -> int:
    """Proportional set size of a process where the kernel tells it, else its resident set; 0 if it is gone."""
    if pid is None:
        return 0
    for path, name in ((f"/proc/{pid}/smaps_rollup", "Pss:"), (f"/proc/{pid}/status", "VmRSS:")):
        with contextlib.suppress(OSError):
            for line in Path(path).read_text().splitlines():
                if line.startswith(name):
                    return int(line.split()[1]) * 1024
    return 0
