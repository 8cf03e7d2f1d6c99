# SPDX-License-Identifier: Apache-2.0
"""What was seen last of the truths, from one wake-up, one start and one boot to the next.

Until the generation ID is seen in this boot, the one on disk stands in for it: a difference is a cold fork.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from vmfork.daemon.ledger import Ledger
from vmfork.detector import GENERATION_ID, Decision, Memory
from vmfork.model import Kind


class Seen:
    """The memory that decisions are taken on."""

    def __init__(self, ledger: Ledger) -> None:
        remembered, saved = ledger.remembered, ledger.saved
        truths = dict(remembered.truths)
        self._id_is_from_disk = GENERATION_ID not in truths and saved.generation_id is not None
        self._is_another_boot = saved.boot_id != remembered.boot_id
        if saved.generation_id is not None:
            truths.setdefault(GENERATION_ID, saved.generation_id)
        self.memory = Memory(truths=truths, credits=remembered.credits)

    def learn(self, decision: Decision, truths: Mapping[str, bytes]) -> tuple[bool, Kind]:
        """Take over what was decided on these truths; whether the ID is seen for the first time in this boot.

        And of which kind the fork is, if it was one.
        """
        was, self.memory = self.memory, decision.memory
        first = GENERATION_ID in truths and (self._id_is_from_disk or GENERATION_ID not in was.truths)
        is_cold = first and self._id_is_from_disk and self._is_another_boot and GENERATION_ID in decision.changed
        self._id_is_from_disk = self._id_is_from_disk and not first
        if self._id_is_from_disk:
            # Whether this is a clone of a disk is still to be seen, also after a fork without a readable ID.
            kept = {GENERATION_ID: was.truths[GENERATION_ID], **self.memory.truths}
            self.memory = replace(self.memory, truths=kept)
        return first, Kind.COLD if is_cold else Kind.LIVE

    @property
    def in_this_boot(self) -> Memory:
        """What may be remembered as seen in this boot."""
        if not self._id_is_from_disk:
            return self.memory
        seen = {name: value for name, value in self.memory.truths.items() if name != GENERATION_ID}
        return replace(self.memory, truths=seen)
