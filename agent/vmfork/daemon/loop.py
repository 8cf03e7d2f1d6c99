# SPDX-License-Identifier: Apache-2.0
"""The daemon's one loop: descriptors, deadlines and signals, all in one thread.

Deadlines are in CLOCK_MONOTONIC: the wall clock is wrong after a fork. While nothing is due and no descriptor is ready
the process sleeps without a time-out. It is epoll itself, not `selectors`: what stands between a descriptor and its
action stands between a fork and the page.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import os
import select
import signal
import time
from collections.abc import Callable
from selectors import EVENT_READ, EVENT_WRITE

from vmfork.annotations import Any

_READABLE = select.EPOLLIN
_FEW = 64  # deadlines that are not worth a sweep
# So much more between two looks at the clock than was waited for: the guest was paused, and its clock ran on. The
# kernel's clocks of a paused guest stand still by design (kvmclock), but not where the processor's own counter is read.
_PAUSE_SEC = 5.0
_ROUND = 64  # descriptors in one round; epoll takes those that had to wait first in the next one


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
    """Waits and calls; `stop` ends `run` after the current round. `register` and what follows are as in `selectors`."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._watched: dict[int, tuple[int, Callable[[int], object]]] = {}
        self._deadlines: list[tuple[float, int, Deadline]] = []
        self._order = itertools.count()
        self._sweep_at = _FEW
        self._running = True
        self._wake_up: tuple[int, int] | None = None
        self._handlers: dict[int, Callable[[], None]] = {}
        self._looked = time.monotonic()
        self._waited = 0.0

    def run(self) -> None:
        while self._running:
            self.turn(self._patience())

    def turn(self, patience: float | None) -> None:
        """One round: wait that many seconds at most (None: for ever), call what is ready, run what is due."""
        self._waited = patience or 0.0
        ready = self._epoll.poll(patience, _ROUND)
        known = self._watched
        for descriptor, events, watched in [(one, events, known.get(one)) for one, events in ready]:
            # An earlier call of this round may have unregistered it, and its number may be another file's by now.
            if watched is not None and known.get(descriptor) is watched:
                interest, action = watched
                action((EVENT_READ if events == _READABLE else _mask(events)) & interest)
        self._run_due()

    def stop(self) -> None:
        self._running = False

    def watch(self, descriptor: int, action: Callable[[], None]) -> None:
        """Call `action` whenever the descriptor is readable."""
        self.register(descriptor, EVENT_READ, lambda _mask: action())

    def forget(self, descriptor: int) -> None:
        """Stop watching; a descriptor that is not watched is no error."""
        if descriptor in self._watched:
            self.unregister(descriptor)

    def register(self, file: Any, events: int, action: Callable[[int], object], /) -> None:
        """Call `action(mask)` whenever one of these events is there; OSError where the kernel refuses."""
        descriptor = _descriptor(file)
        self._epoll.register(descriptor, _interest(events))
        self._watched[descriptor] = (events, action)

    def modify(self, file: Any, events: int, action: Callable[[int], object], /) -> None:
        """Other events, or another action, for what is registered."""
        descriptor = _descriptor(file)
        self._epoll.modify(descriptor, _interest(events))
        self._watched[descriptor] = (events, action)

    def unregister(self, file: Any, /) -> None:
        """The end of it; KeyError for what is not registered."""
        descriptor = _descriptor(file)
        del self._watched[descriptor]
        # Closing a file has taken it out of epoll already.
        with contextlib.suppress(OSError):
            self._epoll.unregister(descriptor)

    def after(self, seconds: float, action: Callable[[], None]) -> Deadline:
        """Call `action` once, so many seconds from now."""
        if len(self._deadlines) >= self._sweep_at:
            self._sweep()
        deadline, when = Deadline(action), self._look() + seconds
        heapq.heappush(self._deadlines, (when, next(self._order), deadline))
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
        now = self._look()
        return max(0.0, self._deadlines[0][0] - now)

    def _look(self) -> float:
        """The time. A pause since the last look, be it in a wait or in what was called, is taken off every deadline."""
        now = time.monotonic()
        passed, waited = now - self._looked, self._waited
        self._looked, self._waited = now, 0.0
        if passed > waited + _PAUSE_SEC:
            # How much of it the guest was running is not known: nobody gets less time than was promised.
            self._deadlines = [(when + passed, order, deadline) for when, order, deadline in self._deadlines]
        return now

    def _run_due(self) -> None:
        # Of one moment: what is set while these run, even for at once, is for the next round, after the descriptors.
        now = self._look()
        while self._deadlines and self._deadlines[0][0] <= now:
            heapq.heappop(self._deadlines)[2].run()


def _descriptor(file: Any) -> int:
    return file if isinstance(file, int) else int(file.fileno())


def _interest(events: int) -> int:
    return (select.EPOLLIN if events & EVENT_READ else 0) | (select.EPOLLOUT if events & EVENT_WRITE else 0)


def _mask(events: int) -> int:
    """An error or a hang-up is reported to readers and writers alike, whoever of them looks for it."""
    return (EVENT_READ if events & ~select.EPOLLOUT else 0) | (EVENT_WRITE if events & ~select.EPOLLIN else 0)
