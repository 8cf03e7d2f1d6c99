# SPDX-License-Identifier: Apache-2.0
"""Writes again what a file did not take, until all of them have it.

A disk that was full for a moment must not leave the last fork unrecorded until the next one comes: a power cut in
between would make the next boot react to it again. While everything is written, nothing here ever wakes up.
"""

from __future__ import annotations

from vmfork.daemon.again import Again
from vmfork.daemon.ledger import Ledger
from vmfork.daemon.loop import Loop


class CatchUp:
    """Tries again with growing pauses from the first refusal on."""

    def __init__(self, loop: Loop, ledger: Ledger) -> None:
        self._ledger = ledger
        self._again = Again(loop, self._try)
        ledger.refusals.refused = self._again.later
        if ledger.refusals.is_behind:
            self._again.later()

    def _try(self) -> None:
        self._ledger.catch_up()
        if not self._ledger.refusals.is_behind:
            self._again.helped()
