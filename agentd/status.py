"""``agentd status``: ask the running daemon over its own API and print what it says."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from agentd.statefolder import read_runtime
from slmfleet.errors import UserError
from slmfleet.units import format_size


def show(state_dir: Path, form: str) -> int:
    """Print the status; exit code 0 when the daemon runs. Raises UserError when it does not."""
    runtime = read_runtime(state_dir)
    if runtime is None:
        raise UserError(f"no agentd runs on the state folder {state_dir}: start it with `agentd run`")
    try:
        # The daemon is on this device: no proxy may stand between.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(f"http://{runtime['api']}/status", timeout=5) as answer:
            facts = json.load(answer)
    except (urllib.error.URLError, OSError, ValueError) as error:
        raise UserError(
            f"agentd (pid {runtime['pid']}) does not answer at {runtime['api']}: {error}; see its log"
        ) from error
    facts = {**runtime, **facts}
    print(json.dumps(facts, indent=1) if form == "json" else "\n".join(lines(facts, time.time())))
    return 0


def lines(facts: dict[str, Any], now_s: float) -> Iterator[str]:
    """The status as text."""
    link = "connected" if facts["connected"] else f"not connected ({facts['problem'] or 'not yet'})"
    yield f"node        {facts['name']} ({facts['node_id']}), agentd {facts['version']}, pid {facts['pid']}"
    yield f"local API   http://{facts['api']}/v1"
    yield f"link        {link}"
    if facts["conflict"]:
        yield f"CONFLICT    {facts['conflict']}"
    yield f"generation  {facts['generation'] or 'none yet'}"
    yield f"certificate {(facts['certificate_expires'] - now_s) / 86400:.1f} days left"
    outbox = facts["outbox"]
    yield f"outbox      {outbox['rows']} rows, {outbox['batches']} batches, {outbox['dropped']} rows dropped so far"
    for item in facts["assignments"]:
        true = [name for name, fact in item["conditions"].items() if fact["status"]]
        why = next(
            (fact["message"] for name, fact in item["conditions"].items() if not fact["status"] and name != "Degraded"),
            "",
        )
        yield f"assignment  {item['id']}: {', '.join(true) or 'nothing yet'}{f' ({why})' if why else ''}"
    for model in facts["models"]:
        size = f", {format_size(model['memory_bytes'])}" if model["memory_bytes"] else ""
        yield f"model       {model['model']}: {model['state']}{size}{' ' + model['reason'] if model['reason'] else ''}"
