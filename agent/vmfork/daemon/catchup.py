# SPDX-License-Identifier: Apache-2.0
"""Writes again what a file did not take, until all of them have it.

A disk that was full for a moment must not leave the last fork unrecorded until the next one comes: a power cut in
between would make the next boot react to it again. While everything is written, nothing here ever wakes up.
"""

from __future__ import annotations

from vmfork.daemon.ledger import Ledger
from vmfork.daemon.loop import Deadline, Loop

_PAUSES_SEC = (1.0, 2.0, 5.0, 10.0, 30.0, 60.0)


class CatchUp:
    """Tries again with growing pauses from the first refusal on."""

    def __init__(self, loop: Loop, ledger: Ledger) -> None:
        self._loop = loop
        self._ledger = ledger
        self._deadline: Deadline | None = None
        self._tries = 0
        ledger.refusals.refused = self._later
        if ledger.refusals.is_behind:
            self._later()

    def _later(self) -> None:
        if self._deadline is None:
            pause = _PAUSES_SEC[min(self._tries, len(_PAUSES_SEC) - 1)]
            self._deadline = self._loop.after(pause, self._try)

    def _try(self) -> None:
        self._deadline = None
        self._tries += 1
        self._ledger.catch_up()
        if not self._ledger.refusals.is_behind:
            self._tries = 0
