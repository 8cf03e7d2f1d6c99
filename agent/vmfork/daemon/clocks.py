# SPDX-License-Identifier: Apache-2.0
"""The clocks at one moment, as an event records them and as they are mixed into the random number generator."""

from __future__ import annotations

import struct
import time
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """Nanoseconds: CLOCK_REALTIME since 1970, CLOCK_BOOTTIME and CLOCK_MONOTONIC since boot."""

    realtime: int
    boottime: int
    monotonic: int

    @classmethod
    def now(cls) -> Moment:
        return cls(
            realtime=time.time_ns(),
            boottime=time.clock_gettime_ns(time.CLOCK_BOOTTIME),
            monotonic=time.monotonic_ns(),
        )

    def to_bytes(self) -> bytes:
        return struct.pack("<qqq", self.realtime, self.boottime, self.monotonic)
