# SPDX-License-Identifier: Apache-2.0
"""Looking without being told to: at an interval where no edge would report a change, and again for what failed.

A source that failed for a reason that may pass (a full table, an error of a device) says nothing when it has passed, so
it is looked for ever more seldom until it is there. While every truth has a live edge and nothing has failed, nothing
here ever wakes up.
"""

from __future__ import annotations

from collections.abc import Callable

from vmfork.daemon.again import Again
from vmfork.daemon.loop import Deadline, Loop


class Timer:
    """Calls what `every` names at its interval, and `probe` again after a failure."""

    def __init__(self, loop: Loop, *, probe: Callable[[], None]) -> None:
        self._loop = loop
        self._next: Deadline | None = None
        self._again = Again(loop, probe)

    @property
    def runs(self) -> bool:
        """Whether something is called at an interval."""
        return self._next is not None

    def every(self, seconds: float, action: Callable[[], None]) -> None:
        """From now on call this and nothing else at the interval."""

        def tick() -> None:
            # Set first: the action may decide about the timer itself.
            self._next = self._loop.after(seconds, tick)
            action()

        self.stop()
        self._next = self._loop.after(seconds, tick)

    def stop(self) -> None:
        """Nothing is called at an interval any more."""
        if self._next is not None:
            self._next.cancel()
            self._next = None

    def note_failed(self, *, failed: bool) -> None:
        """Probe after a pause if a source has failed; a longer one each time that did not help."""
        if failed:
            self._again.later()
        else:
            self._again.helped()
