"""The text that Prometheus reads."""

from __future__ import annotations

import pytest

from controlplane.metrics import Metric, Sample, is_local, process_metrics, render


def test_the_format() -> None:
    text = render(
        [
            Metric("a_total", "counter", "All of it.", [Sample(12345678.0)]),
            Metric("b", "gauge", "Some.", [Sample(1, {"z": 'q"\n\\', "a": "x"})]),
        ]
    )
    assert text == (
        "# HELP a_total All of it.\n# TYPE a_total counter\na_total 12345678.0\n"
        '# HELP b Some.\n# TYPE b gauge\nb{a="x",z="q\\"\\n\\\\"} 1\n'
    )


def test_the_process_tells_of_itself() -> None:
    values = {metric.name: next(iter(metric.samples)).value for metric in process_metrics()}
    assert values["process_resident_memory_bytes"] > 1_000_000


@pytest.mark.parametrize(
    ("client", "header", "local"),
    [
        ("127.0.0.1", b"accept", True),
        ("127.9.9.9", b"accept", True),
        ("::1", b"accept", True),
        ("::ffff:127.0.0.1", b"accept", True),
        ("192.0.2.7", b"accept", False),
        ("::ffff:192.0.2.7", b"accept", False),
        ("2001:db8::1", b"accept", False),
        ("", b"accept", False),
        ("127.0.0.1", b"x-forwarded-for", False),
        ("::1", b"forwarded", False),
    ],
)
def test_only_this_machine_is_this_machine(client: str, header: bytes, local: bool) -> None:
    assert is_local({"client": (client, 1), "headers": [(header, b"127.0.0.1")]}) == local


def test_a_caller_without_an_address_is_not_this_machine() -> None:
    assert not is_local({"client": None, "headers": []})
