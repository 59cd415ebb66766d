"""The nodes that are connected to this process: their sessions and relays, by node id.

One writer: the gRPC handlers attach and detach. Readers (the gateway, the telemetry ingester, the distributor) see what
is true now; nothing here waits.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from controlplane.node_api.exchange import RelayLink
from slmfleet.v1 import session_pb2 as pb

if TYPE_CHECKING:
    from controlplane.node_api.session import Session

SUPERSEDED = "a newer session of this node began"


class NodeLinks:
    """Registry of live sessions and relays. A newer one of the same node ends the older."""

    def __init__(self) -> None:
        self._sessions: dict[str, Session] = {}
        self._relays: dict[str, RelayLink] = {}

    def relay(self, node_id: str) -> RelayLink | None:
        """The node's relay, through which ``request`` reaches its API; None while there is none."""
        relay = self._relays.get(node_id)
        # One that has just broken is gone at once, not only when its handler has cleaned up.
        return relay if relay is not None and not relay.closed.is_set() else None

    def session(self, node_id: str) -> Session | None:
        """The node's session; None while there is none here."""
        return self._sessions.get(node_id)

    def sessions(self) -> Iterator[Session]:
        """All sessions, safe against changes while iterating."""
        return iter(list(self._sessions.values()))

    def connected(self) -> set[str]:
        """Ids of all nodes with a session or a relay here."""
        return self._sessions.keys() | self._relays.keys()

    def silent_s(self, node_id: str, now: float) -> float:
        """Seconds since the node was heard over its session here (``now`` by the event loop's clock); 0 when its
        session is elsewhere, since then nothing is known."""
        session = self._sessions.get(node_id)
        return max(0.0, now - session.heard_at) if session else 0.0

    def outbox_committed(
        self, node_id: str, stream: str, epoch: int, ranges: Iterable[tuple[int, int]], credit: int = 0
    ) -> bool:
        """Tell the node that these rows (``first`` and ``last`` inclusive) are committed in Postgres.

        ``credit``: how many more batches of the stream are welcome now. False when the node has no session here: it
        will send the batch again, and hear of it then.
        """
        session = self._sessions.get(node_id)
        if session is None:
            return False
        lines = [pb.Range(first=first, last=last) for first, last in ranges]
        ack = pb.OutboxAck(stream=stream, epoch=epoch, ranges=lines, credit=credit)
        return session.send(pb.Down(outbox_ack=ack))

    def attach_session(self, session: Session) -> None:
        """Register; of two sessions of one node the one with the lower epoch ends."""
        other = self._sessions.get(session.node_id)
        if other is not None and other.epoch > session.epoch:
            session.end(SUPERSEDED)
            return
        self._sessions[session.node_id] = session
        if other is not None:
            other.end(SUPERSEDED)

    def detach_session(self, session: Session) -> None:
        """Forget it, unless a newer one has its place."""
        if self._sessions.get(session.node_id) is session:
            del self._sessions[session.node_id]

    def attach_relay(self, link: RelayLink) -> None:
        """Register; the node's older relay here ends."""
        older = self._relays.get(link.node_id)
        self._relays[link.node_id] = link
        if older is not None:
            older.close("a newer relay of this node began")

    def detach_relay(self, link: RelayLink) -> None:
        """Forget it, unless a newer one has its place."""
        if self._relays.get(link.node_id) is link:
            del self._relays[link.node_id]

    def drop(self, node_id: str, reason: str) -> None:
        """End everything of a node that may not be here any more."""
        if session := self._sessions.get(node_id):
            session.end(reason, denied=True)
        if relay := self._relays.get(node_id):
            relay.close(reason)

    def close(self, reason: str) -> None:
        """The control plane stops: end all sessions and relays."""
        for session in self.sessions():
            session.end(reason, come_back_s=1.0)
        for relay in list(self._relays.values()):
            relay.close(reason)
