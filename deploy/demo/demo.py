"""A whole fleet on this machine: a control plane, three nodes, a real model, a kill, a failover.

    make demo                    stays up until Ctrl-C
    make demo ONCE=1             ends by itself; the last line of standard output is one JSON object

It drives the programs that a fleet has, through the doors that everybody has: `controlplane dev`, `agentd enroll` and
`agentd run` as processes, REST as fleetctl does, the gateway with the OpenAI protocol.

Exit codes: 0 every step happened, 1 one did not, 2 wrong call, 130 interrupted before the end.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from interrupts import Interrupted, Interrupts
from programs import Ensemble, StepFailed
from steps import QUESTIONS, Demo, default_data_dir
from telling import Story, short

from slmfleet.errors import UserError


def main() -> int:
    """Parse, run, end everything, and say how it went."""
    arguments = _arguments()
    data_dir = arguments.data_dir.expanduser().absolute()
    interrupts = Interrupts()
    interrupts.install()
    story = Story()
    programs = Ensemble(data_dir / "logs", interrupts)
    demo = Demo(data_dir, story, programs)
    started = time.monotonic()
    try:
        with _only_one(data_dir):
            code = _play(demo, interrupts, arguments.once)
    except Interrupted:
        code = 130
    except UserError as error:
        story.failure(str(error))
        code = error.exit_code
    story.seconds["total"] = round(time.monotonic() - started, 3)
    if arguments.once and code == 0:
        print(json.dumps(demo.result()), flush=True)
    return code


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="demo", description="A whole slmfleet on this machine.")
    parser.add_argument("--once", action="store_true", help="end after the failover and print one JSON object")
    parser.add_argument("--data-dir", type=Path, default=default_data_dir(), help="where all state lives (%(default)s)")
    return parser.parse_args()


def _play(demo: Demo, interrupts: Interrupts, once: bool) -> int:
    """All steps, then the end of every program, whatever happened; returns the exit code."""
    code = 1
    try:
        _steps(demo)
        code = 0
        if not once:
            _stay_up(demo, interrupts)
    except Interrupted:
        code = 130 if code else 0
    except UserError as error:
        # Told before the rest is stopped: who watches wants the reason, not the end.
        demo.story.failure(str(error))
        if isinstance(error, StepFailed) and error.program is not None:
            demo.story.log(error.program.tail(), error.program.log)
        code = error.exit_code
    finally:
        late = _end(demo)
    return code or late


def _steps(demo: Demo) -> None:
    story = demo.story
    story.title("slmfleet: a whole fleet on one machine", f"state and logs: {short(demo.data_dir)}")
    with story.step("controlplane", "Start the control plane"):
        demo.start_controlplane()
    with story.step("model", "Fetch a small language model"):
        demo.fetch_model()
    with story.step("nodes", "Start three nodes"):
        demo.start_nodes()
    with story.step("apply", "Apply deploy/demo/fleet.yaml: a model, an agent, a deployment of two replicas"):
        demo.apply_fleet()
    with story.step("replicas", "Wait for two replicas, then ask"):
        demo.await_replicas()
        demo.ask(QUESTIONS[0])
    with story.step("failover", "Kill the node that answered, and ask again at once"):
        demo.kill_and_ask_again()


def _stay_up(demo: Demo, interrupts: Interrupts) -> NoReturn:
    with demo.story.step("up", "The fleet is yours"):
        demo.show_urls()
        demo.story.line("Ctrl-C ends everything.", "bold")
        while True:
            demo.tell_deaths()
            interrupts.wait()


def _end(demo: Demo) -> int:
    if not demo.programs.programs:
        return 0
    started = time.monotonic()
    late = demo.programs.end()
    demo.story.seconds["stop"] = round(time.monotonic() - started, 3)
    demo.story.console.print()
    for line in late:
        demo.story.line(f"had to be killed: {line}", "red")
    demo.story.line(f"Everything is stopped ({demo.story.seconds['stop']:.1f} s).", "dim")
    return 1 if late else 0


@contextlib.contextmanager
def _only_one(data_dir: Path) -> Iterator[None]:
    data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    lock = data_dir / "demo.lock"
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(
                f"another demo runs on {data_dir}: end it with Ctrl-C, or give this one a folder with --data-dir"
            ) from None
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(main())
