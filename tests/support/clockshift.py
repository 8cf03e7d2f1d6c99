# SPDX-License-Identifier: Apache-2.0
"""Clocks that go wrong in a program under test while it runs, and only there."""

from __future__ import annotations

import mmap
import struct
import subprocess
from pathlib import Path

from support.tools import need

_SOURCE = Path(__file__).with_suffix(".c")
HOUR_NS = 3_600_000_000_000
YEAR_NS = 365 * 24 * HOUR_NS


class ClockShift:
    """Give `environment` to the program; then `set` moves its clocks, by nanoseconds, as often as wanted."""

    def __init__(self, directory: Path) -> None:
        library, shifts = directory / "clockshift.so", directory / "clockshift"
        gcc = need("gcc", package="gcc")
        subprocess.run([gcc, "-shared", "-fPIC", "-Wall", "-o", str(library), str(_SOURCE), "-ldl"], check=True)
        shifts.write_bytes(bytes(4096))
        with shifts.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), 4096)
        self.environment = {"LD_PRELOAD": str(library), "CLOCKSHIFT": str(shifts)}

    def set(self, *, realtime: int = 0, monotonic: int = 0, boottime: int = 0) -> None:
        self._map[:24] = struct.pack("<qqq", realtime, monotonic, boottime)
