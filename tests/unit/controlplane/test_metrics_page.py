"""The text that Prometheus reads."""

from __future__ import annotations

from controlplane.metrics import Metric, Sample, process_metrics, render


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
