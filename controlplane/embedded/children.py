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


def start_time(pid: int) -> str | None:
    """When the process started, in the kernel's ticks since boot: with the pid it names one process for ever."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    # The name, in parentheses, may hold spaces and parentheses; start time is field 22, the 20th after the name.
    return stat.rpartition(")")[2].split()[19]


def is_running_in(pid: int, folder: Path) -> bool:
    """Whether ``pid`` lives with ``folder`` as its working directory (as every postmaster has its data folder)."""
    try:
        return Path(os.readlink(f"/proc/{pid}/cwd")) == folder.resolve()
    except OSError:
        return False
