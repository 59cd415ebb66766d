"""Which batches are new, and what the table of committed ranges looks like after them. Pure.

A node repeats a batch until it hears that it is committed, so the same batch comes more than once, through any number
of replicas. What is committed is kept as ranges of row numbers per (node, stream, epoch); ranges that touch become one,
so a healthy node has one row there however long it lives.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from controlplane.ingest.decode import DecodedBatch


class StreamKey(NamedTuple):
    """A numbering of rows."""

    node_id: str
    stream: str
    epoch: int


class Span(NamedTuple):
    """Rows ``first`` to ``last``, both included, ``dropped`` of them given up by the node."""

    first: int
    last: int
    dropped: int = 0


@dataclass(frozen=True, slots=True)
class DedupPlan:
    """What to do with a group of batches.

    ``fresh``: store their rows. ``repeated``: committed before, only say so again. ``overlapping``: share rows with a
    committed range without being inside it; immutable batches never do, so the node is wrong. ``written`` and
    ``removed``: the changes to the table of ranges; a removed one is named by its ``first``.
    """

    fresh: Sequence[DecodedBatch]
    repeated: Sequence[DecodedBatch]
    overlapping: Sequence[DecodedBatch]
    written: Sequence[tuple[StreamKey, Span]]
    removed: Sequence[tuple[StreamKey, int]]


def key_of(batch: DecodedBatch) -> StreamKey:
    """The numbering that the batch's rows count in."""
    return StreamKey(batch.node_id, batch.stream, batch.epoch)


def plan_dedup(batches: Iterable[DecodedBatch], committed: Mapping[StreamKey, Sequence[Span]]) -> DedupPlan:
    """Judge ``batches`` in the order of their arrival against the ranges that are committed."""
    before = {key: sorted(spans) for key, spans in committed.items()}
    after: dict[StreamKey, list[Span]] = defaultdict(list, {key: list(spans) for key, spans in before.items()})
    fresh: list[DecodedBatch] = []
    repeated: list[DecodedBatch] = []
    overlapping: list[DecodedBatch] = []
    for batch in batches:
        spans = after[key_of(batch)]
        touched = _overlaps(spans, batch)
        if not touched:
            _add(spans, Span(batch.first, batch.last, batch.dropped))
            fresh.append(batch)
        elif len(touched) == 1 and touched[0].first <= batch.first and batch.last <= touched[0].last:
            repeated.append(batch)
        else:
            overlapping.append(batch)
    written = [(key, span) for key, spans in after.items() for span in spans if span not in before.get(key, ())]
    firsts = {(key, span.first) for key, spans in after.items() for span in spans}
    removed = [(key, span.first) for key, spans in before.items() for span in spans if (key, span.first) not in firsts]
    return DedupPlan(fresh, repeated, overlapping, written, removed)


def _overlaps(spans: Sequence[Span], batch: DecodedBatch) -> Sequence[Span]:
    """``spans`` are sorted and apart, so both their ends ascend."""
    start = bisect_left(spans, batch.first, key=lambda span: span.last)
    end = bisect_right(spans, batch.last, key=lambda span: span.first)
    return spans[start:end]


def _add(spans: list[Span], new: Span) -> None:
    """Insert ``new``, which overlaps none, and melt it with the neighbours that it touches."""
    place = bisect_left(spans, new.first, key=lambda span: span.first)
    if place < len(spans) and spans[place].first == new.last + 1:
        right = spans.pop(place)
        new = Span(new.first, right.last, new.dropped + right.dropped)
    if place > 0 and spans[place - 1].last == new.first - 1:
        left = spans.pop(place - 1)
        new = Span(left.first, new.last, left.dropped + new.dropped)
        place -= 1
    spans.insert(place, new)


def spans_by_stream(batches: Iterable[DecodedBatch]) -> dict[StreamKey, list[tuple[int, int]]]:
    """(first, last) of the batches, by numbering: what to acknowledge."""
    found: dict[StreamKey, list[tuple[int, int]]] = defaultdict(list)
    for batch in batches:
        found[key_of(batch)].append((batch.first, batch.last))
    return dict(found)
