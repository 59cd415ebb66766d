"""One model driven by xllamacpp in one process: ``direct.py FILE CONTEXT THREADS``.

Reads an OpenAI chat request a line, streams the answer into a counter, writes ``{"tokens", "seconds"}`` a line.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any


def main() -> None:
    """Serve standard input until its end."""
    import xllamacpp

    file, context, threads = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    parameters = xllamacpp.CommonParams()
    parameters.model.path = file
    parameters.n_ctx = context
    parameters.cache_ram_mib = 0
    parameters.n_parallel = 1
    parameters.cpuparams.n_threads = threads
    parameters.cpuparams_batch.n_threads = threads
    server = xllamacpp.Server(parameters)
    for line in sys.stdin:
        tokens = 0

        def count(chunk: Any) -> bool:
            nonlocal tokens
            for part in chunk if isinstance(chunk, list) else [chunk]:
                tokens = (part.get("usage") or {}).get("completion_tokens", tokens)
            return False

        started = time.perf_counter()
        server.handle_chat_completions(json.loads(line), count)
        print(json.dumps({"tokens": tokens, "seconds": time.perf_counter() - started}), flush=True)
    # A destructor of the runtime may hang: leave without it.
    os._exit(0)


if __name__ == "__main__":
    main()
