# SPDX-License-Identifier: Apache-2.0
"""Edges: what wakes the detector. One module for each facility of the kernel.

An edge never decides that the guest was forked. It says what it heard, and the detector holds that against the truths.
"""

from __future__ import annotations

from dataclasses import dataclass

from vmfork.annotations import Protocol
from vmfork.model import SourceStatus


@dataclass(frozen=True, slots=True, kw_only=True)
class Heard:
    """What one edge had to say in one wake-up.

    `words` counts the kernel's own statements that the generation ID changed; `lost` means that some may have been
    missed; `record_us` is the kernel's time stamp of the newest statement (microseconds of its log clock);
    `hotplug` means that a device may have come or gone and the sources should be probed again.
    """

    words: int = 0
    lost: bool = False
    record_us: int | None = None
    hotplug: bool = False


NOTHING = Heard()


class Edge(Protocol):
    """Something with a descriptor that becomes readable."""

    name: str

    def fileno(self) -> int:
        """The descriptor to wait on; -1 where there is nothing to wait on."""

    def drain(self) -> Heard:
        """Read what is ready, without blocking; of a flood a part, so as not to starve the others."""

    def status(self) -> SourceStatus:
        """Whether this edge is live, and if not, why, and what would make it live."""

    def close(self) -> None:
        """Give the descriptor back."""
