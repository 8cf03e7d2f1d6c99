# SPDX-License-Identifier: Apache-2.0
"""Clocks that jump while nothing happens, at a fork and while a hook runs: no event, no spurious or lost deadline."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from support.clockshift import HOUR_NS, YEAR_NS, ClockShift
from support.runningdaemon import vmforkctl
from torture.crash import WORKERS
from torture.liveguest import HOOK, LiveGuest
from torture.scenario import Broken
from torture.table import Row
from vmfork import history
from vmfork.errors import VmforkError
from vmfork.model import HookOutcome
from vmfork.page import read_page
from vmfork.varlink.client import Client

# Says that it runs, then waits for the clocks to have moved. What it prints makes the reactor look at them.
_WAITS = """echo >>"$VMFORK_ROOT/began"
while [ ! -e "$VMFORK_ROOT/go" ]; do sleep 0.02; done
echo "goes on"
sleep 0.2
echo "$VMFORK_GENERATION" >>"$VMFORK_ROOT/ran\""""


@dataclass(frozen=True, slots=True, kw_only=True)
class Leap:
    """How far each clock jumps, in nanoseconds."""

    name: str
    realtime: int = 0
    monotonic: int = 0
    boottime: int = 0


LEAPS = (
    Leap(name="wall clock ten years on", realtime=10 * YEAR_NS),
    Leap(name="wall clock forty years back", realtime=-40 * YEAR_NS),
    Leap(name="suspended for hours", realtime=5 * HOUR_NS, boottime=5 * HOUR_NS),
    Leap(name="boot time alone", boottime=2000 * HOUR_NS),
)
# A guest whose clocksource is the bare TSC, paused by a host that lets that count on: a hook is not charged for it.
PAUSED = Leap(name="all clocks, paused for hours", realtime=9 * HOUR_NS, monotonic=9 * HOUR_NS, boottime=9 * HOUR_NS)


def _play(name: str, play: Callable[[LiveGuest, ClockShift], None], *, hook: str = HOOK) -> Row:
    with LiveGuest(name, hook=hook) as live:
        clocks = ClockShift(live.top)
        live.environment.update(clocks.environment)
        live.configure("[Detect]\nPollIntervalSec=20ms\n[React]\nTimeoutSec=2\nAckTimeoutSec=1\n")
        try:
            live.start()
            play(live, clocks)
            row = live.row
            row.seen += len(live.events())
            row.check(row.seen == row.sent, f"{row.sent} forks were sent, {row.seen} seen")
        except (Broken, VmforkError) as error:
            live.row.check(False, str(error))
        live.row.hooks += len(live.ran())
        return live.row


def idle(leap: Leap) -> Row:
    """The leap while nothing happens, a restart in the strange time, then a fork, then the way back."""

    def play(live: LiveGuest, clocks: ClockShift) -> None:
        clocks.set(realtime=leap.realtime, monotonic=leap.monotonic, boottime=leap.boottime)
        live.row.check(live.problems() == [], "status names a problem")
        live.stop()
        live.start()
        live.row.check(live.shows(1), "a leap of the clocks was taken for a fork")
        value = live.fork()
        live.until(lambda: live.is_written(2, value), "the fork settled")
        event = history.load(live.guest.paths).events[-1]
        told = abs(event.detected_at_ns - leap.realtime - time.time_ns())
        live.row.check(told < 60 * 10**9, "the fork has another time than the guest's wall clock")
        shown = read_page(live.guest.paths.generation_page).detected_at_ns
        live.row.check(abs(shown - event.detected_at_ns) < 1000, "the page has another time than the history")
        clocks.set()
        live.row.check(live.shows(2), "the way back was taken for a fork")
        last = live.fork()
        live.until(lambda: live.is_written(3, last), "the next fork settled")

    return _play(f"{leap.name}, idle", play)


def during_a_hook(leap: Leap) -> Row:
    """The leap while a hook runs that is well within its time: it is not ended, and its result counts."""

    def play(live: LiveGuest, clocks: ClockShift) -> None:
        value = live.fork()
        live.until(lambda: (live.guest.root / "began").exists(), "the hook began")
        clocks.set(realtime=leap.realtime, monotonic=leap.monotonic, boottime=leap.boottime)
        (live.guest.root / "go").touch()
        live.until(lambda: live.is_written(2, value), "the fork settled")
        event = history.load(live.guest.paths).events[-1]
        live.row.check([one.result for one in event.hooks] == [HookOutcome.OK], "the hook was not left to end")
        step = leap.realtime - leap.boottime
        live.row.check(abs((event.clock_step_ns or 0) - step) < 10**9, f"the clock step is {event.clock_step_ns}")

    return _play(f"{leap.name}, during a hook", play, hook=_WAITS)


def with_a_deadline(leap: Leap) -> Row:
    """The leap while a hook hangs and a subscriber does not acknowledge: both deadlines hold, by the steady clock."""

    def play(live: LiveGuest, clocks: ClockShift) -> None:
        with Client.connect(live.guest.paths.public_socket, timeout=30) as client:
            notices = client.stream("io.vmfork.Subscribe", {"track": True})
            next(notices)
            began = time.monotonic()
            live.fork()
            live.until(lambda: (live.guest.root / "began").exists(), "the hook began")
            clocks.set(realtime=leap.realtime, monotonic=leap.monotonic, boottime=leap.boottime)
            live.until(live.is_over, "the hook that hangs was ended")
            took = time.monotonic() - began
            live.row.check(1.5 < took < 15, f"its deadline of 2 s came after {took:.1f} s")
            event = history.load(live.guest.paths).events[-1]
            live.row.check([one.result for one in event.hooks] == [HookOutcome.TIMEOUT], "it is not recorded as such")
            clocks.set()
            (live.guest.root / "go").touch()
            value = live.fork()
            live.until(lambda: live.is_written(3, value), "the next fork settled without the acknowledgement")

    return _play(f"{leap.name}, a deadline", play, hook=_WAITS)


def undone_by_itself(leap: Leap) -> Row:
    """The leap while a snapshot is prepared, and a restart in the strange time: undone at its time, and once."""

    def play(live: LiveGuest, clocks: ClockShift) -> None:
        began = time.monotonic()
        run = vmforkctl(live.guest, "prepare", "--deadline", "2")
        live.row.check(run.returncode == 0, f"prepare failed: {run.stderr}")
        clocks.set(realtime=leap.realtime, monotonic=leap.monotonic, boottime=leap.boottime)
        live.stop()
        live.start()
        live.until(lambda: "after-snapshot" in live.ran(), "the preparation was undone by itself")
        took = time.monotonic() - began
        # The subscribers' second to get ready comes first. By a steady clock that jumped it may well be too early.
        live.row.check(leap.monotonic != 0 or took >= 3, f"its deadline of 3 s came after {took:.1f} s")
        value = live.fork()
        live.until(lambda: live.is_written(2, value), "the fork settled")
        live.row.check(live.ran() == ["before-snapshot", "after-snapshot", "after-fork"], f"hooks ran as {live.ran()}")

    return _play(f"{leap.name}, prepared for a snapshot", play, hook='echo "$1" >>"$VMFORK_ROOT/ran"')


def clock_rows() -> Iterator[Row]:
    """One row of all leaps in all places."""
    row = Row(name="clocks that jump")
    plays = (idle, during_a_hook, with_a_deadline, undone_by_itself)
    cases = [(play, leap) for play in plays for leap in (*LEAPS, PAUSED)]
    with ThreadPoolExecutor(WORKERS) as pool:
        for result in pool.map(lambda case: case[0](case[1]), cases):
            row.add(result)
    yield row
