"""The programs that the demo drives: started with a log file each, watched, and ended in order."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import psutil
from interrupts import Interrupts

from slmfleet.errors import UserError

Value = TypeVar("Value")
_BIN = Path(sys.executable).parent
_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None)
_TAIL_LINES = 15
_GRACE_S = 20.0


class StepFailed(UserError):
    """A step of the demo did not happen; ``program`` is the one whose log tells why, None if none does."""

    def __init__(self, message: str, program: Program | None = None) -> None:
        super().__init__(message)
        self.program = program


class Program:
    """One running program of this project, the leader of its own session and process group."""

    def __init__(self, name: str, arguments: Sequence[str | Path], log: Path) -> None:
        """Start it; its output goes to ``log``. The kernel sends it SIGTERM when this process dies."""
        self.name = name
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        command, *rest = map(str, arguments)
        with log.open("wb") as out:
            self._process = subprocess.Popen(
                [str(_BIN / command), *rest],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                # A Ctrl-C on the terminal must reach this process alone: it ends the others in order.
                start_new_session=True,
                preexec_fn=lambda: _libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM)),
            )
        self.family: list[psutil.Process] = []

    @property
    def pid(self) -> int:
        return self._process.pid

    def exit_code(self) -> int | None:
        """None while it runs; negative: the signal that ended it."""
        return self._process.poll()

    def how_it_ended(self) -> str:
        """``was killed by SIGKILL`` or ``ended with exit code 1``; call it when it did."""
        code = self.exit_code()
        if code is None or code >= 0:
            return f"ended with exit code {code}"
        return f"was killed by {signal.Signals(-code).name}"

    def note_family(self) -> list[psutil.Process]:
        """Its children, their children and so on; remembered, so that none can be left behind later."""
        with contextlib.suppress(psutil.NoSuchProcess):
            known = {process.pid for process in self.family}
            self.family += [p for p in psutil.Process(self.pid).children(recursive=True) if p.pid not in known]
        return self.family

    def tail(self) -> str:
        """The last lines of its log."""
        try:
            lines = self.log.read_text(errors="replace").splitlines()
        except OSError as error:
            return f"(cannot read the log: {error.strerror})"
        return "\n".join(lines[-_TAIL_LINES:])

    def ask_to_end(self) -> None:
        """SIGTERM, once."""
        self.note_family()
        if self.exit_code() is None:
            self._process.terminate()

    def kill(self) -> None:
        """SIGKILL to the process alone, as when a device loses power; returns when it is dead."""
        self.note_family()
        self._process.kill()
        self._process.wait()

    def gone(self) -> bool:
        """Whether it and all of its family ended."""
        return self.exit_code() is not None and not any(map(_runs, self.family))

    def kill_rest(self) -> list[str]:
        """SIGKILL to whatever of it still runs; returns what that was."""
        late = []
        if self.exit_code() is None:
            late.append(f"{self.name} (pid {self.pid})")
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
            self._process.wait()
        for process in filter(_runs, self.family):
            late.append(f"a child of {self.name} (pid {process.pid})")
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(self.family, timeout=5)
        return late


class Ensemble:
    """All programs that were started, in that order."""

    def __init__(self, logs: Path, interrupts: Interrupts) -> None:
        self._logs = logs
        self._interrupts = interrupts
        self.programs: dict[str, Program] = {}

    def start(self, name: str, arguments: Sequence[str | Path]) -> Program:
        """Start a program that ``end`` will end."""
        with self._interrupts.held():
            self.programs[name] = Program(name, arguments, self._logs / f"{name}.log")
        return self.programs[name]

    def run(self, name: str, arguments: Sequence[str | Path], timeout_s: float = 60.0) -> None:
        """Run a program to its end; raises StepFailed unless it exits with 0."""
        program = self.start(name, arguments)
        self.wait(lambda: program.exit_code() is not None, f"{name} did not end", timeout_s, [program], ended_ok=True)
        if program.exit_code() != 0:
            raise StepFailed(f"{name} {program.how_it_ended()}", program)
        del self.programs[name]

    def wait(
        self,
        condition: Callable[[], Value],
        otherwise: str,
        timeout_s: float,
        needs: Sequence[Program],
        ended_ok: bool = False,
    ) -> Value:
        """The first truthy value of ``condition``. Raises StepFailed after ``timeout_s``, or when a needed program
        ends."""
        deadline = time.monotonic() + timeout_s
        while True:
            if value := condition():
                return value
            for program in needs:
                if not ended_ok and program.exit_code() is not None:
                    raise StepFailed(f"{program.name} {program.how_it_ended()}", program)
            if time.monotonic() > deadline:
                raise StepFailed(f"{otherwise} within {timeout_s:.0f} s", needs[0] if needs else None)
            time.sleep(0.05)

    def ended(self) -> list[Program]:
        """Those that run no more, in the order of their start; notes the families of the others."""
        found = []
        for program in self.programs.values():
            if program.exit_code() is None:
                program.note_family()
            else:
                found.append(program)
        return found

    def pids(self) -> dict[str, int]:
        """Every program, and its children: ``edge-1``, and ``edge-1/<pid>`` for the worker of a model."""
        found: dict[str, int] = {}
        for name, program in self.programs.items():
            found[name] = program.pid
            with contextlib.suppress(psutil.NoSuchProcess):
                found |= {f"{name}/{child.pid}": child.pid for child in psutil.Process(program.pid).children()}
        return found

    def end(self) -> list[str]:
        """End all programs, nodes before the control plane. Returns what had to be killed: normally nothing.

        An interrupt that comes now ends the patience, not the work.
        """
        self._interrupts.only_count()
        nodes = [program for name, program in self.programs.items() if name != "controlplane"]
        servers = [program for name, program in self.programs.items() if name == "controlplane"]
        return [line for group in (nodes, servers) for line in self._end(group)]

    def _end(self, group: Sequence[Program]) -> list[str]:
        for program in group:
            program.ask_to_end()
        interrupts = self._interrupts.count
        deadline = time.monotonic() + _GRACE_S
        while not all(program.gone() for program in group):
            if time.monotonic() > deadline or self._interrupts.count > interrupts:
                break
            time.sleep(0.02)
        return [line for program in group for line in program.kill_rest()]


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
