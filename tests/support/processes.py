"""Child processes in tests: start with captured output, wait for an event with a deadline, leave nothing behind."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import re
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Self, TypeVar

import psutil

DEADLINE_S = 30.0
_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None)

Value = TypeVar("Value")


class Child:
    """A program that runs as a child of the test; its standard output and error are kept line by line.

    The kernel sends it ``death_signal`` when the test run dies, so that not even ``kill -9`` leaves it behind.
    """

    def __init__(
        self,
        argv: Sequence[str | Path],
        *,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        user: int | None = None,
        group: int | None = None,
        death_signal: signal.Signals = signal.SIGKILL,
    ) -> None:
        self.argv = [str(part) for part in argv]
        self.lines: list[str] = []
        self._news = threading.Condition()
        self._closed = False
        self.process = subprocess.Popen(
            self.argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env={**os.environ, **(env or {})},
            cwd=cwd,
            user=user,
            group=group,
            extra_groups=None if user is None else [],
            start_new_session=True,
            preexec_fn=lambda: _libc.prctl(_PR_SET_PDEATHSIG, int(death_signal)),
        )
        self._reader = threading.Thread(target=self._read, name=f"output of {self.pid}", daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        """Process id; that of the process group too."""
        return self.process.pid

    @property
    def output(self) -> str:
        """All that it wrote so far."""
        return "\n".join(self.lines)

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._news:
                self.lines.append(line.rstrip("\n"))
                self._news.notify_all()
        with self._news:
            self._closed = True
            self._news.notify_all()

    def wait_for_line(self, pattern: str, deadline_s: float = DEADLINE_S) -> re.Match[str]:
        """The first match of ``pattern`` in the output, past or future; AssertionError at the deadline or the end."""
        matcher = re.compile(pattern)
        seen = 0
        deadline = time.monotonic() + deadline_s
        with self._news:
            while True:
                for line in self.lines[seen:]:
                    seen += 1
                    if match := matcher.search(line):
                        return match
                if self._closed or not self._news.wait(deadline - time.monotonic()):
                    why = "its output ended" if self._closed else f"{deadline_s} s passed"
                    raise AssertionError(f"{self.argv[0]} never wrote /{pattern}/: {why}. It wrote:\n{self.output}")

    def wait_for_exit(self, deadline_s: float = DEADLINE_S) -> int:
        """Its exit status (negative: the signal that ended it); AssertionError at the deadline."""
        try:
            status = self.process.wait(deadline_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self.argv[0]} did not end in {deadline_s} s. It wrote:\n{self.output}") from None
        self._reader.join(5)
        return status

    def descendants(self) -> list[psutil.Process]:
        """Its children, their children and so on, now."""
        try:
            return psutil.Process(self.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []

    def send(self, number: signal.Signals) -> None:
        """One signal, to the process alone."""
        self.process.send_signal(number)

    def stop(self, number: signal.Signals = signal.SIGTERM, deadline_s: float = DEADLINE_S) -> int:
        """Ask it to end, wait, and give its exit status. Kills it and fails if it does not, or leaves children."""
        family = self.descendants()
        if self.process.poll() is None:
            self.send(number)
        try:
            status = self.wait_for_exit(deadline_s)
            assert_gone(family)
        finally:
            self.kill(family)
        return status

    def kill(self, family: Sequence[psutil.Process] = ()) -> None:
        """SIGKILL to it and to all that it started; safe to call at any time."""
        for process in [*family, *self.descendants()]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(10)
        self._reader.join(5)
        assert self.process.stdout is not None
        self.process.stdout.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill(self.descendants())


def assert_gone(processes: Sequence[psutil.Process | int], deadline_s: float = 10.0) -> None:
    """All of them have ended or end before the deadline; AssertionError names those that live on."""
    known = []
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            known.append(psutil.Process(process) if isinstance(process, int) else process)
    _, alive = psutil.wait_procs(known, timeout=deadline_s)
    told = [f"{p.pid} {' '.join(p.cmdline())}" for p in alive if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    assert not told, f"left running: {told}"


def wait_until(condition: Callable[[], Value], what: str, deadline_s: float = DEADLINE_S) -> Value:
    """The first truthy value of ``condition``; for what another process does and nothing here can announce."""
    deadline = time.monotonic() + deadline_s
    pause = threading.Event()
    while True:
        if value := condition():
            return value
        if time.monotonic() >= deadline:
            raise AssertionError(f"{what}: not within {deadline_s} s")
        pause.wait(0.02)


async def eventually(condition: Callable[[], Value], what: str, deadline_s: float = DEADLINE_S) -> Value:
    """``wait_until`` for tests that run an event loop, which goes on meanwhile."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + deadline_s
    while not (value := condition()):
        if loop.time() >= deadline:
            raise AssertionError(f"{what}: not within {deadline_s} s")
        await asyncio.sleep(0.01)
    return value


def wait_for_file(path: Path, deadline_s: float = DEADLINE_S) -> Path:
    """``path``, once it exists."""
    wait_until(path.exists, f"{path} exists", deadline_s)
    return path


def free_port(host: str = "127.0.0.1") -> int:
    """A TCP port that nobody listened on a moment ago."""
    with socket.create_server((host, 0)) as listener:
        return int(listener.getsockname()[1])


def accepts(host: str, port: int) -> bool:
    """Whether something accepts TCP connections there now."""
    with contextlib.suppress(OSError), socket.create_connection((host, port), timeout=1.0):
        return True
    return False


@contextlib.contextmanager
def nothing_left_behind() -> Iterator[None]:
    """Fails when the block leaves children of this process that were not there before."""
    before = {process.pid for process in psutil.Process().children(recursive=True)}
    yield
    assert_gone([process for process in psutil.Process().children(recursive=True) if process.pid not in before])
