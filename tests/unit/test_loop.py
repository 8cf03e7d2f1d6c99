# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
import signal
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest

from support.clockshift import ClockShift
from support.runningdaemon import environment
from vmfork.daemon.loop import Loop


def test_deadlines_run_in_the_order_of_their_times() -> None:
    loop = Loop()
    ran: list[str] = []
    loop.after(0.04, loop.stop)
    loop.after(0.03, lambda: ran.append("late"))
    loop.after(0.01, lambda: ran.append("early"))
    loop.run()
    assert ran == ["early", "late"]


def test_a_cancelled_deadline_does_not_run() -> None:
    loop = Loop()
    ran: list[str] = []
    loop.after(0.0, lambda: ran.append("never")).cancel()
    loop.after(0.01, loop.stop)
    loop.run()
    assert ran == []


def test_cancelled_deadlines_take_no_room() -> None:
    loop = Loop()
    tracemalloc.start()
    try:
        for _ in range(10_000):
            loop.after(60.0, loop.stop).cancel()
        assert tracemalloc.get_traced_memory()[0] < 100_000
    finally:
        tracemalloc.stop()


def test_a_sweep_keeps_what_is_still_due() -> None:
    loop = Loop()
    ran: list[int] = []
    for number in range(500):
        deadline = loop.after(0.0, lambda number=number: ran.append(number))  # type: ignore[misc]
        if number % 5:
            deadline.cancel()
    loop.after(0.01, loop.stop)
    loop.run()
    assert ran == list(range(0, 500, 5))


def test_a_descriptor_that_another_one_took_away_is_not_called() -> None:
    loop = Loop()
    called: list[int] = []
    pipes = [os.pipe() for _ in range(2)]

    def first_wins(number: int) -> None:
        called.append(number)
        for read_end, _ in pipes:
            loop.forget(read_end)
        loop.stop()

    for number, (read_end, write_end) in enumerate(pipes):
        os.write(write_end, b"x")
        loop.watch(read_end, lambda number=number: first_wins(number))  # type: ignore[misc]
    loop.run()
    assert len(called) == 1


def test_signals_are_handled_in_the_loop() -> None:
    loop = Loop()
    ran: list[str] = []

    def heard() -> None:
        ran.append("heard")
        loop.stop()

    before = signal.getsignal(signal.SIGUSR1)
    try:
        loop.on_signal(signal.SIGUSR1, heard)
        loop.after(0.0, lambda: os.kill(os.getpid(), signal.SIGUSR1))
        loop.run()
    finally:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGUSR1, before)
    assert ran == ["heard"]


def test_forgetting_what_was_never_watched_is_no_error() -> None:
    read_end, _ = os.pipe()
    Loop().forget(read_end)


def test_what_is_put_off_for_no_time_lets_descriptors_go_first() -> None:
    loop = Loop()
    read_end, write_end = os.pipe()
    rounds: list[str] = []

    def heard() -> None:
        rounds.append("heard")
        loop.stop()

    def put_off() -> None:
        rounds.append("put off")
        if len(rounds) < 100:
            loop.after(0.0, put_off)

    loop.watch(read_end, heard)
    loop.after(0.0, put_off)
    loop.after(20.0, loop.stop)
    os.write(write_end, b"x")
    loop.run()
    assert rounds.count("put off") < 4
    assert rounds[-2:].count("heard") == 1


_LEAPS = """
import os, struct, sys, threading
from vmfork.daemon.loop import Loop

moment = sys.argv[1]
loop, ran = Loop(), []
reading, writing = os.pipe()

def leap():
    with open(os.environ["CLOCKSHIFT"], "r+b") as file:
        file.write(struct.pack("<qqq", 0, 9 * 3_600_000_000_000, 0))

def paused():
    leap()
    os.write(writing, b"x")

def resumed():
    os.read(reading, 1)
    if moment == "running":
        leap()
    ran.append("resumed")
    loop.after(0.3, lambda: ran.append("a third of a second later"))

loop.watch(reading, resumed)
loop.after(1.0, lambda: ran.append("deadline"))
if moment == "waiting":
    threading.Timer(0.2, paused).start()
elif moment == "about to wait":
    paused()
else:
    os.write(writing, b"x")
loop.after(2.0, loop.stop)
loop.run()
print(*ran, sep=", ")
"""


@pytest.mark.parametrize("moment", ["about to wait", "waiting", "running"])
def test_a_guest_that_was_paused_for_hours_owes_no_deadline(tmp_path: Path, moment: str) -> None:
    clocks = ClockShift(tmp_path)
    said = subprocess.run(
        [sys.executable, "-c", _LEAPS, moment],
        env={**environment(), **clocks.environment},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert said.stdout.strip() == "resumed, a third of a second later, deadline"
