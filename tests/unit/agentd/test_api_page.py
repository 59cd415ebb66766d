"""docs/api.md says what the API serves."""

from __future__ import annotations

import re
from pathlib import Path

from agentd.api import completions, embeddings, responses_request, validation
from agentd.api.checks import SAMPLING_NAMES
from agentd.api.endpoints import CONTROLS, GENERATORS
from agentd.api.prometheus import _HELP, METRIC_NAMES

PAGE = (Path(__file__).parents[3] / "docs" / "api.md").read_text()
METRICS = PAGE[PAGE.index("## Metrics") :]


def test_the_page_lists_exactly_the_metrics() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \| (.*) \|$", METRICS, re.MULTILINE)
    assert [name for name, _, _ in rows] == list(METRIC_NAMES)
    assert {name: (kind, meaning) for name, kind, meaning in rows} == _HELP


def test_the_page_lists_every_path() -> None:
    for path in GENERATORS:
        assert f"`POST {path}`" in PAGE
    for path, method in CONTROLS.items():
        assert f"`{method} {path}`" in PAGE


def test_the_page_names_every_field() -> None:
    known = validation._KNOWN | completions._KNOWN | embeddings._KNOWN | responses_request._KNOWN | SAMPLING_NAMES
    # Fields of responses that mean nothing without state, and what is named by its parts.
    silent = {"truncation", "reasoning", "max_tool_calls", "best_of"}
    missing = [name for name in known - silent if not re.search(rf"`{name}[`:.]", PAGE)]
    assert not missing
