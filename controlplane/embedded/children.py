"""Child processes of `controlplane dev`: started so that they cannot outlive it, stopped with rising firmness."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

_PR_SET_PDEATHSIG = 1
# Looked up once, before any fork: the child between fork and exec must not load anything.
_libc = ctypes.CDLL(None)


@dataclass(frozen=True)
class Owner:
    """The user that a child runs as; None ids = the user of this process."""

    uid: int | None = None
    gid: int | None = None


def spawn(
    argv: Sequence[str | Path],
    *,
    owner: Owner = Owner(),
    death_signal: signal.Signals = signal.SIGKILL,
    stdin: int = subprocess.DEVNULL,
    log: IO[bytes] | int = subprocess.DEVNULL,
    cwd: Path | None = None,
) -> subprocess.Popen[bytes]:
    """Start ``argv`` in a session of its own: Ctrl-C in a terminal reaches this process only, which stops children in
    order. When this process dies the kernel sends the child ``death_signal``.

    The kernel ties that signal to the *thread* that spawns: call this from one that lives as long as the program.
    """
    return subprocess.Popen(
        [str(part) for part in argv],
        stdin=stdin,
        stdout=log,
        stderr=log,
        cwd=cwd,
        user=owner.uid,
        group=owner.gid,
        extra_groups=None if owner.uid is None else [],
        start_new_session=True,
        # After the change of user, which would clear it.
        preexec_fn=lambda: _libc.prctl(_PR_SET_PDEATHSIG, int(death_signal)),
    )


def stop(process: subprocess.Popen[bytes], steps: Sequence[tuple[signal.Signals, float]]) -> None:
    """Send the signals one after the other, each with seconds to wait for the end, until it has ended; SIGKILL last."""
    for number, seconds in (*steps, (signal.SIGKILL, 10.0)):
        if process.poll() is not None:
            return
        process.send_signal(number)
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            continue


def is_running_in(pid: int, program: str, folder: Path) -> bool:
    """Whether ``pid`` is a ``program`` with ``folder`` as its working directory, as every postmaster has its data
    folder: a pid alone may have been given to another process since it was written down."""
    try:
        name = Path(f"/proc/{pid}/comm").read_text().strip()
        return name == program and Path(os.readlink(f"/proc/{pid}/cwd")) == folder.resolve()
    except OSError:
        return False


def all_running_in(program: str, folder: Path) -> list[int]:
    """The processes for which ``is_running_in`` holds. Those of other users show their folder to root alone."""
    pids = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdecimal()]
    return [pid for pid in pids if is_running_in(pid, program, folder)]
