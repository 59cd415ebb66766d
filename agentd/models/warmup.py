"""What a warm model does right after its load: a first token, and the agents' instructions in its prefix cache.

The first request after a load pays for pages that nobody touched yet, for kernels that are compiled when they are used
first, and for reading the instructions; a model that is kept warm has paid for that before anybody asks.
"""

from __future__ import annotations

import json

from agentd.models.ticket import Ticket
from agentd.models.types import GenerateRequest, LoadableModel
from slmfleet.v1 import worker_pb2

_TIMEOUT_S = 120.0


def warm_up(model: LoadableModel, slots: int, now_s: float) -> list[Ticket]:
    """One request for each of the model's instructions, as far as there are slots to keep them; one without any."""
    return [_ticket(model, prompt, now_s) for prompt in (model.warm_prompts or ("",))[:slots]]


def _ticket(model: LoadableModel, prompt: str, now_s: float) -> Ticket:
    system = [{"role": "system", "content": prompt}] if prompt else []
    body = {"messages": [*system, {"role": "user", "content": "."}], "max_tokens": 1, "temperature": 0}
    request = GenerateRequest(model.key, body, timeout_s=_TIMEOUT_S, queue_timeout_s=_TIMEOUT_S, priority=0)
    message = worker_pb2.WorkerRequest(generate=worker_pb2.WorkerRequest.Generate(body=json.dumps(body).encode()))
    return Ticket(request, message, now_s, internal=True)
