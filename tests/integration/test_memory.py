# SPDX-License-Identifier: Apache-2.0
"""What the detector keeps after many forks, each of them reacted to."""

from __future__ import annotations

import re
from pathlib import Path

from support.runningdaemon import write_hook
from torture.liveguest import LiveGuest

WARM_UP, FORKS = 40, 160
# A list of free tuples that nobody empties costs about 1 KiB for each fork, up to some MiB.
GROWTH_KIB = 48


def resident_kib(pid: int) -> int:
    found = re.search(r"^VmRSS:\s*(\d+) kB$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1])


def test_forks_that_were_reacted_to_leave_nothing_in_memory() -> None:
    with LiveGuest("memory") as live:
        live.configure("".join(f"[Hook {number}-off]\nEnable=no\n" for number in range(20, 31)))
        for number in range(20, 31):
            write_hook(live.guest, f"{number}-off", "exit 0")
        pid = live.start()
        before = 0
        for generation in range(2, 2 + WARM_UP + FORKS):
            if generation == 2 + WARM_UP:
                before = resident_kib(pid)
            live.fork()
            live.until(lambda wanted=generation: live.shows(wanted) and live.is_over(), "the fork settled")  # type: ignore[misc]
        assert resident_kib(pid) - before <= GROWTH_KIB
