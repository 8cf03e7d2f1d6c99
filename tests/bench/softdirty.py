# SPDX-License-Identifier: Apache-2.0
"""Pages that a process has written to, by the kernel's soft-dirty bits (bit 55 of an entry of /proc/PID/pagemap).

Also a program of its own, `softdirty.py forget|count PID`, for a guest that has nothing of the bench.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path


def forget(pid: int) -> bool:
    """Begin anew; False where this kernel or this user cannot."""
    try:
        Path(f"/proc/{pid}/clear_refs").write_text("4")
    except OSError:
        return False
    return True


def count(pid: int) -> int:
    """The pages written to since."""
    found = 0
    with open(f"/proc/{pid}/maps") as maps, open(f"/proc/{pid}/pagemap", "rb", buffering=0) as entries:
        for line in maps:
            first, last = (int(end, 16) // 4096 for end in line.split()[0].split("-"))
            if line.rstrip().endswith("[vsyscall]"):
                continue
            data = os.pread(entries.fileno(), (last - first) * 8, first * 8)
            found += sum(1 for entry in memoryview(data).cast("Q") if entry >> 55 & 1 and entry >> 63)
    return found


if __name__ == "__main__":
    verb, process = sys.argv[1], int(sys.argv[2])
    if verb == "count":
        print(count(process))
    elif not forget(process):
        sys.exit(f"the soft-dirty bits of process {process} cannot be cleared")
