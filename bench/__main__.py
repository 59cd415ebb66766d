"""``python -m bench [--only NAME] [--rounds N] [--list]``: prints one JSON line for each benchmark.

Progress goes to standard error. Exit code 1 when a benchmark could not be measured; the others still run.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import traceback
from pathlib import Path

from bench.report import ROOT, Result
from slmfleet.errors import UserError

NAMES = (
    "agentd-idle-memory", "agentd-start", "local-tokens", "first-token-added", "relay-chunks", "failover-killed",
)  # fmt: skip
RESULTS = ROOT / "bench" / "results"


def main() -> int:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=NAMES, metavar="NAME", help=f"one of {', '.join(NAMES)}")
    parser.add_argument("--rounds", type=int, help="rounds, at least five; for failover-killed, kills")
    parser.add_argument("--list", action="store_true", help="print the names and end")
    arguments = parser.parse_args()
    if arguments.list:
        print(*NAMES, sep="\n")
        return 0
    failed = 0
    for name in [arguments.only] if arguments.only else NAMES:
        print(f"bench: {name} ...", file=sys.stderr, flush=True)
        try:
            result = _run(name, arguments.rounds)
        except (UserError, AssertionError, OSError):
            # One benchmark that cannot be measured must not hide the figures of the others.
            traceback.print_exc()
            failed += 1
            continue
        print(result.line(), flush=True)
        _keep(result)
    return 1 if failed else 0


def _run(name: str, rounds: int | None) -> Result:
    module = importlib.import_module(f"bench.{name.replace('-', '_')}")
    result: Result = module.run(**({} if rounds is None else {"rounds": max(5, rounds)}))
    return result


def _keep(result: Result) -> None:
    RESULTS.mkdir(parents=True, exist_ok=True)
    with Path(RESULTS / f"{result.name}.jsonl").open("a") as file:
        file.write(result.line() + "\n")


if __name__ == "__main__":
    sys.exit(main())
