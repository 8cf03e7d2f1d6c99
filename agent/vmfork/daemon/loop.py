# SPDX-License-Identifier: Apache-2.0
"""The daemon's one loop: descriptors, deadlines and signals, all in one thread.

Every key of the selector carries a callable as its data; `key.data(mask)` is called when it is ready. Deadlines are in
CLOCK_MONOTONIC: the wall clock is wrong after a fork. While nothing is due and no descriptor is ready the process
sleeps without a time-out.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import os
import selectors
import signal
import time
from collections.abc import Callable

_FEW = 64  # deadlines that are not worth a sweep


class Deadline:
    """Something to do later; `cancel` may be called at any time, and more than once."""

    __slots__ = ("_action",)

    def __init__(self, action: Callable[[], None]) -> None:
        self._action: Callable[[], None] | None = action

    def cancel(self) -> None:
        self._action = None

    @property
    def is_cancelled(self) -> bool:
        return self._action is None

    def run(self) -> None:
        action, self._action = self._action, None
        if action is not None:
            action()


class Loop:
    """Waits and calls; `stop` ends `run` after the current round."""

    def __init__(self) -> None:
        self.selector = selectors.DefaultSelector()
        self._deadlines: list[tuple[float, int, Deadline]] = []
        self._order = itertools.count()
        self._sweep_at = _FEW
        self._running = True
        self._wake_up: tuple[int, int] | None = None
        self._handlers: dict[int, Callable[[], None]] = {}

    def run(self) -> None:
        while self._running:
            for key, mask in self.selector.select(self._patience()):
                # An earlier call of this round may have unregistered it.
                if self.selector.get_map().get(key.fd) is key:
                    key.data(mask)
            self._run_due()

    def stop(self) -> None:
        self._running = False

    def watch(self, descriptor: int, action: Callable[[], None]) -> None:
        """Call `action` whenever the descriptor is readable."""
        self.selector.register(descriptor, selectors.EVENT_READ, lambda _mask: action())

    def forget(self, descriptor: int) -> None:
        """Stop watching; a descriptor that is not watched is no error."""
        with contextlib.suppress(KeyError, ValueError):
            self.selector.unregister(descriptor)

    def after(self, seconds: float, action: Callable[[], None]) -> Deadline:
        """Call `action` once, so many seconds from now."""
        if len(self._deadlines) >= self._sweep_at:
            self._sweep()
        deadline = Deadline(action)
        heapq.heappush(self._deadlines, (time.monotonic() + seconds, next(self._order), deadline))
        return deadline

    def _sweep(self) -> None:
        # A storm of forks sets and cancels deadlines far faster than they would fall due.
        self._deadlines = [entry for entry in self._deadlines if not entry[2].is_cancelled]
        heapq.heapify(self._deadlines)
        self._sweep_at = max(_FEW, 2 * len(self._deadlines))

    def on_signal(self, number: int, action: Callable[[], None]) -> None:
        """Call `action` from the loop, not from the signal's own context, where little is allowed."""
        if self._wake_up is None:
            read_end, write_end = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
            self._wake_up = read_end, write_end
            signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
            self.watch(read_end, self._take_signals)
        self._handlers[number] = action
        signal.signal(number, lambda _number, _frame: None)

    def _take_signals(self) -> None:
        if self._wake_up is None:
            return
        with contextlib.suppress(BlockingIOError):
            for number in os.read(self._wake_up[0], 64):
                action = self._handlers.get(number)
                if action is not None:
                    action()

    def _patience(self) -> float | None:
        while self._deadlines and self._deadlines[0][2].is_cancelled:
            heapq.heappop(self._deadlines)
        if not self._deadlines:
            return None
        return max(0.0, self._deadlines[0][0] - time.monotonic())

    def _run_due(self) -> None:
        # Of one moment: what is set while these run, even for at once, is for the next round, after the descriptors.
        now = time.monotonic()
        while self._deadlines and self._deadlines[0][0] <= now:
            heapq.heappop(self._deadlines)[2].run()
