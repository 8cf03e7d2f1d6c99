# SPDX-License-Identifier: Apache-2.0
"""The vmclock page as a hypervisor writes it (include/uapi/linux/vmclock-abi.h, version 1 with a generation counter).

Written from the header and apart from the agent's own reader, so that a common mistake cannot hide.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

PAGE = 4096
_MAGIC = 0x4B4C4356
_COUNTER_PRESENT = 1 << 8
_NOTIFICATION_PRESENT = 1 << 9
_NO_COUNTER = 0xFF
_TIME_TAI = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class VmClock:
    """What the guest reads: `seq_count` is even, the two markers are compared for inequality only."""

    seq_count: int = 0
    disruption_marker: int = 0
    generation_counter: int = 0

    def page(self) -> bytes:
        """The whole page."""
        flags = _COUNTER_PRESENT | _NOTIFICATION_PRESENT
        head = struct.pack(
            "<IIHBBIQQ", _MAGIC, PAGE, 1, _NO_COUNTER, _TIME_TAI, self.seq_count, self.disruption_marker, flags
        )
        return head.ljust(0x68, b"\0") + struct.pack("<Q", self.generation_counter).ljust(PAGE - 0x68, b"\0")
