# SPDX-License-Identifier: Apache-2.0
"""Waiting with a condition and a deadline: the only two ways in which the lab ever waits.

An emulated guest on a busy machine is slow in bursts, so deadlines are generous: they bound a hang, they do not
measure anything.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from lab.host import LabError

T = TypeVar("T")


class Deadline:
    """A point in time `seconds` from now, for something that `what` describes."""

    def __init__(self, seconds: float, what: str) -> None:
        self.what = what
        self.seconds = seconds
        self._end = time.monotonic() + seconds

    def remaining(self) -> float:
        """Seconds left, more than 0. Raises LabError when none are."""
        left = self._end - time.monotonic()
        if left <= 0:
            raise LabError(f"not within {self.seconds:.0f} s: {self.what}")
        return left


def until(condition: Callable[[], T | None], *, seconds: float, what: str, every: float = 0.05) -> T:
    """Ask `condition` again and again until its answer is true, and return that. Raises LabError at the deadline."""
    deadline = Deadline(seconds, what)
    while not (answer := condition()):
        time.sleep(min(every, deadline.remaining()))
    return answer
