# SPDX-License-Identifier: Apache-2.0
"""Who listens: tells every subscriber what happened, and knows which tracked one has not acknowledged yet.

A notice is encoded once and sent to all. A tracked subscriber delays "settled" until it acknowledges, its connection
ends, or the admin's time-out has passed: what it cannot do is delay anything for longer.
"""

from __future__ import annotations

from collections.abc import Callable

from vmfork.jsonfields import JsonObject
from vmfork.model import ForkEvent
from vmfork.varlink import framing
from vmfork.varlink.server import Call, Caller

FORK, SETTLED, BEFORE_SNAPSHOT, AFTER_SNAPSHOT = "fork", "settled", "before-snapshot", "after-snapshot"

_TRACKED_PER_UID = 256


class Subscriber:
    """One open Subscribe call."""

    __slots__ = ("acknowledged", "call", "overdue", "ready_for", "track")

    def __init__(self, call: Call, *, track: bool, acknowledged: int, snapshot: int) -> None:
        self.call = call
        self.track = track
        self.acknowledged = acknowledged
        self.ready_for = snapshot
        self.overdue = False

    def to_json(self) -> JsonObject:
        peer = self.call.peer
        return {"uid": peer.uid, "pid": peer.pid, "command": _command(peer.pid), "overdue": self.overdue}


class Subscribers:
    """All open subscriptions; `changed` is called when one acknowledged or went away."""

    def __init__(self, changed: Callable[[], None]) -> None:
        self._changed = changed
        self._all: dict[Caller, Subscriber] = {}

    def add(
        self,
        call: Call,
        *,
        track: bool,
        generation: int,
        acknowledged: int,
        snapshot: int,
        event: ForkEvent | None,
    ) -> None:
        """Answer a Subscribe call with its first notice and keep it open."""
        connection = call.connection
        tracked_by_uid = sum(one.track for one in self._all.values() if one.call.peer.uid == call.peer.uid)
        if track and tracked_by_uid >= _TRACKED_PER_UID:
            call.error("io.vmfork.Busy", {"limit": f"{_TRACKED_PER_UID} tracked subscribers for one user"})
            return
        self._all[connection] = Subscriber(call, track=track, acknowledged=acknowledged, snapshot=snapshot)
        connection.on_close = lambda: self._gone(connection)
        call.reply(_notice("hello", generation, event=event), continues=True)

    def tell(
        self, notice: str, generation: int, *, event: ForkEvent | None = None, snapshot: int | None = None
    ) -> None:
        """Send one notice to everybody."""
        message = framing.encode_reply(_notice(notice, generation, event=event, snapshot=snapshot), continues=True)
        for connection in list(self._all):
            connection.send_encoded(message)

    def acknowledge(self, connection: Caller, *, generation: int, snapshot: int | None) -> bool:
        """A subscriber adapted, or is ready for a snapshot; False if this connection has no subscription."""
        subscriber = self._all.get(connection)
        if subscriber is None:
            return False
        if snapshot is None:
            subscriber.acknowledged = max(subscriber.acknowledged, generation)
            subscriber.overdue = False
        else:
            subscriber.ready_for = max(subscriber.ready_for, snapshot)
        self._changed()
        return True

    def expect(self) -> None:
        """A new fork: the time to acknowledge begins anew for everybody."""
        for subscriber in self._all.values():
            subscriber.overdue = False

    def give_up(self, generation: int) -> None:
        """The time to acknowledge has passed: who has not is overdue, and nobody waits for it any more."""
        for subscriber in self.stragglers(generation):
            subscriber.overdue = True

    def stragglers(self, generation: int) -> list[Subscriber]:
        """The tracked subscribers that have not acknowledged this generation."""
        return [one for one in self._all.values() if one.track and one.acknowledged < generation]

    def awaited(self, generation: int) -> bool:
        """True while somebody should still be waited for."""
        return any(not one.overdue for one in self.stragglers(generation))

    def not_ready(self, snapshot: int) -> list[Subscriber]:
        """The tracked subscribers that are not ready for this snapshot."""
        return [one for one in self._all.values() if one.track and one.ready_for < snapshot]

    def _gone(self, connection: Caller) -> None:
        self._all.pop(connection, None)
        self._changed()


def _notice(notice: str, generation: int, *, event: ForkEvent | None = None, snapshot: int | None = None) -> JsonObject:
    shown = None if event is None else event.to_json()
    return {"notice": notice, "generation": generation, "snapshot": snapshot, "event": shown}


def _command(pid: int) -> str | None:
    """The name of a peer, for a person; a PID may have been used again since it connected, so it is only a hint."""
    try:
        with open(f"/proc/{pid}/comm", "rb") as file:
            name = file.read(64).decode("utf-8", "replace").strip()
    except OSError:
        return None
    return name if name.isprintable() else None
