# SPDX-License-Identifier: Apache-2.0
"""A stream of forks for programs with an event loop of their own: select, asyncio, trio, or a plain loop."""

from __future__ import annotations

from vmfork.annotations import TYPE_CHECKING
from vmfork.library.root import paths
from vmfork.library.subscription import Notice, Subscription

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Self

    from vmfork.model import ForkEvent


class Watcher:
    """Tells each fork from its making on, also over restarts of vmforkd (several in between count as the newest).

    `fileno` is readable when `read` has something to do and stays the same until `close`; iterating blocks. With
    `track`, vmforkd calls this guest settled only after `ack`, or after the admin's deadline; a tracked watcher that
    is asked before a snapshot says at its next `read` that it is ready. One thread at a time; a child of os.fork()
    makes its own. Raises Unavailable where vmforkd does not answer.
    """

    def __init__(self, *, track: bool = False) -> None:
        self._subscription = Subscription(paths(), track=track)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[ForkEvent]:
        return self

    def __next__(self) -> ForkEvent:
        """The next fork; blocks until there is one, ends when the watcher was closed."""
        while not self._subscription.closed:
            notice = self._subscription.wait()
            if notice is not None:
                event = self._event(notice)
                if event is not None:
                    return event
        raise StopIteration

    def fileno(self) -> int:
        """The descriptor to wait on for reading; -1 is never returned, a closed watcher raises ValueError."""
        return self._subscription.fileno()

    def read(self) -> ForkEvent | None:
        """The next fork that has happened, None if there is none now. Never blocks.

        One call for each time that the descriptor is readable is enough: it stays readable while forks are left.
        """
        while True:
            notice = self._subscription.take()
            if notice is None:
                return None
            event = self._event(notice)
            if event is not None:
                return event

    def ack(self, event: ForkEvent) -> None:
        """This program has adapted to the fork; nothing happens unless it is tracked. Never blocks for long."""
        self._subscription.acknowledge(event.generation)

    def close(self) -> None:
        """End the subscription and close the descriptor; remove it from selectors first."""
        self._subscription.close()

    def _event(self, notice: Notice) -> ForkEvent | None:
        if notice.kind == "before-snapshot":
            self._subscription.acknowledge(notice.generation, notice.snapshot)
        return notice.event if notice.kind == "fork" else None
