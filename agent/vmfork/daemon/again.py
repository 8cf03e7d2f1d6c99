# SPDX-License-Identifier: Apache-2.0
"""Trying again, with growing pauses, what failed for a reason that may pass; otherwise nothing here ever wakes up."""

from __future__ import annotations

from collections.abc import Callable

from vmfork.daemon.loop import Deadline, Loop

_PAUSES_SEC = (1.0, 2.0, 5.0, 10.0, 30.0, 60.0)


class Again:
    """Calls `action` once for each `later`, the more seldom the more often it did not help."""

    def __init__(self, loop: Loop, action: Callable[[], object]) -> None:
        self._loop = loop
        self._action = action
        self._deadline: Deadline | None = None
        self._tries = 0

    def later(self) -> None:
        """It failed: try again after a pause; one that is waited for already is enough."""
        if self._deadline is None:
            self._deadline = self._loop.after(_PAUSES_SEC[min(self._tries, len(_PAUSES_SEC) - 1)], self._try)
            self._tries += 1

    def helped(self) -> None:
        """It works: the next failure is a first one."""
        self._tries = 0

    def _try(self) -> None:
        self._deadline = None
        self._action()
