"""Whether a node is there: one pure function over its session, MQTT presence and telemetry.

All times are seconds since 1970 by Postgres's clock; all spans are multiples of one TTL. *Silence* counts from the
last beat that came over the session; *grace* moves that start to the moment when the control plane came up, or when
the replica that held the session died, because nobody listened before it. The first row that fits decides:

======================  ===========  ========  =========  ==========================================================
stream                  silence      presence  telemetry  verdict
======================  ===========  ========  =========  ==========================================================
never opened            any          any       any        disconnected
open                    < 1.5 beats  any       any        connected: a last will cannot outvote a beat
open                    < 1 TTL      offline   any        suspect: a beat is missing *and* the last will came
open                    < 1 TTL      else      any        connected
its replica died        < 1 TTL      any       any        as before: nobody can know yet
closed                  < 2 TTL      any       any        suspect, at once
open, silent            1 to 2 TTL   any       any        suspect
any                     2 to 5 TTL   any       any        disconnected
any                     >= 5 TTL     any       < 3 TTL    disconnected: it lives, and only its session is broken
any                     >= 5 TTL     any       older      lost: its replicas may be replaced
======================  ===========  ========  =========  ==========================================================

Grace never makes a verdict better than it was: a node that was lost before a restart of the control plane stays lost
until it is heard. "Connected" is ``drained`` or ``draining`` if the operator wished it, ``reconciling`` while a node
that came back has yet to apply its newest desired state, else ``online``::

    (new) ─▶ disconnected ─▶ reconciling ─▶ online ◀─▶ suspect ─▶ disconnected ─▶ lost
                                  ▲           │ ▲                      │            │
                                  │    drain  ▼ │ undrain              │            │
                                  │   draining ─▶ drained              │            │
                                  └────────────────────────────────────┴────────────┘  its stream opened
"""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from enum import StrEnum


class NodeState(StrEnum):
    """What the control plane thinks of a node; the words of ``nodes.state``."""

    ONLINE = "online"
    SUSPECT = "suspect"
    DISCONNECTED = "disconnected"
    LOST = "lost"
    RECONCILING = "reconciling"
    DRAINING = "draining"
    DRAINED = "drained"


# How bad a state is; all connected states are alike.
_LEVELS = (NodeState.ONLINE, NodeState.SUSPECT, NodeState.DISCONNECTED, NodeState.LOST)
_LEVEL_OF = {state: level for level, state in enumerate(_LEVELS)}
CONNECTED = frozenset({NodeState.ONLINE, NodeState.RECONCILING, NodeState.DRAINING, NodeState.DRAINED})
DOWN = frozenset({NodeState.SUSPECT, NodeState.DISCONNECTED, NodeState.LOST})


@dataclass(frozen=True, slots=True)
class LivenessPolicy:
    """The fleet's one time scale. ``beat_s``: seconds between two beats of a session; the rest are multiples."""

    beat_s: float = 5.0
    beats_per_ttl: float = 3.0
    suspect_ttls: float = 1.0
    disconnected_ttls: float = 2.0
    fence_ttls: float = 4.0
    lost_ttls: float = 5.0
    # Telemetry younger than this proves that a node lives. One interval of telemetry is two TTLs at the defaults.
    telemetry_ttls: float = 3.0
    # With this many beats of silence an offline presence (the last will) is believed.
    presence_beats: float = 1.5

    @property
    def ttl_s(self) -> float:
        """Seconds of silence after which a node is suspect."""
        return self.beat_s * self.beats_per_ttl


@dataclass(frozen=True, slots=True)
class Session:
    """The newest session of a node. ``stream_open``: nobody has reported its end (its holder may be dead)."""

    stream_open: bool
    last_seen_at: float
    # When the lease of the replica that held the open stream ran out; None while that replica lives.
    owner_died_at: float | None = None
    # Why the stream was closed, as the session's holder wrote it.
    close_reason: str = ""


@dataclass(frozen=True, slots=True)
class Facts:
    """All that the verdict on one node depends on."""

    previous: NodeState
    session: Session | None
    # Since when the control plane has been up without a gap.
    up_since: float
    # What the node's MQTT connection last said: True, False (the last will) or None (nothing yet).
    presence: bool | None = None
    telemetry_at: float | None = None
    # The operator's wish, and whether the node holds a desired state that carries it.
    drain_wished: bool = False
    drain_applied: bool = False
    # Whether the node has applied its newest desired state.
    current: bool = False


@dataclass(frozen=True, slots=True)
class Verdict:
    """``recheck_at``: the next moment at which time alone can change the verdict; None = never."""

    state: NodeState
    reason: str
    recheck_at: float | None = None


def assess(now: float, policy: LivenessPolicy, facts: Facts) -> Verdict:
    """The state of one node at ``now``; see the table above."""
    session = facts.session
    if session is None:
        return Verdict(NodeState.DISCONNECTED, "it has never connected")
    graced_from = max(session.last_seen_at, facts.up_since, session.owner_died_at or 0.0)
    silence = now - graced_from
    held = session.stream_open and session.owner_died_at is None
    recheck_at = _next_threshold(now, policy, facts, (session.last_seen_at, graced_from))

    if held and silence < policy.suspect_ttls * policy.ttl_s:
        if facts.presence is False and silence >= policy.presence_beats * policy.beat_s:
            last = _time(session.last_seen_at)
            return Verdict(NodeState.SUSPECT, f"no beat since {last}, and its last will came over MQTT", recheck_at)
        state, reason = _connected(facts)
        return Verdict(state, reason, recheck_at)

    level = _level(policy, silence, facts, now)
    if not session.stream_open:
        level = max(level, 1)
    # What grace hides is not better than what was known before it.
    level = max(level, min(_LEVEL_OF.get(facts.previous, 0), _level(policy, now - session.last_seen_at, facts, now)))
    if level == 0:
        return Verdict(
            facts.previous if facts.previous in CONNECTED else NodeState.SUSPECT,
            "the control-plane replica that held its session died; it has one TTL to connect again",
            recheck_at,
        )
    return Verdict(_LEVELS[level], _why(level, now, session, facts, policy), recheck_at)


def _connected(facts: Facts) -> tuple[NodeState, str]:
    """Which of the connected states."""
    if facts.drain_wished:
        if facts.drain_applied:
            return NodeState.DRAINED, "drained by an operator"
        return NodeState.DRAINING, "an operator drains it; it has yet to apply that"
    returning = facts.previous in (NodeState.DISCONNECTED, NodeState.LOST, NodeState.RECONCILING)
    if returning and not facts.current:
        return NodeState.RECONCILING, "it is back and has yet to apply its newest desired state"
    return NodeState.ONLINE, "its session beats"


def _level(policy: LivenessPolicy, silence: float, facts: Facts, now: float) -> int:
    """Index into ``_LEVELS`` by silence alone, with telemetry as a counter-proof of death."""
    ttls = silence / policy.ttl_s
    if ttls >= policy.lost_ttls:
        alive = facts.telemetry_at is not None and now - facts.telemetry_at < policy.telemetry_ttls * policy.ttl_s
        return 2 if alive else 3
    return 2 if ttls >= policy.disconnected_ttls else 1 if ttls >= policy.suspect_ttls else 0


def _why(level: int, now: float, session: Session, facts: Facts, policy: LivenessPolicy) -> str:
    """The sentence for a node that is down; it stays true as time goes by, for it is stored. Silence is told as it is,
    without grace."""
    silence = now - session.last_seen_at
    text = f"no beat since {_time(session.last_seen_at)}"
    if not session.stream_open:
        closed = "its stream closed" + (f" ({session.close_reason})" if session.close_reason else "")
        text = f"{closed}, {text}" if level > 1 else closed
    if level == 2 and silence >= policy.lost_ttls * policy.ttl_s and facts.telemetry_at is not None:
        text += "; it still sends telemetry" if now - facts.telemetry_at < policy.telemetry_ttls * policy.ttl_s else ""
    return text


def _time(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def _next_threshold(now: float, policy: LivenessPolicy, facts: Facts, silent_from: tuple[float, float]) -> float | None:
    """The earliest moment after ``now`` at which an entry of the table changes for this node.

    ``silent_from``: where silence counts from without grace, and with it.
    """
    ttl = policy.ttl_s
    thresholds = (policy.suspect_ttls, policy.disconnected_ttls, policy.lost_ttls)
    moments = [start + factor * ttl for start in silent_from for factor in thresholds]
    if facts.presence is False:
        moments.append(silent_from[1] + policy.presence_beats * policy.beat_s)
    if facts.telemetry_at is not None:
        moments.append(facts.telemetry_at + policy.telemetry_ttls * ttl)
    return min((moment for moment in moments if moment > now), default=None)
