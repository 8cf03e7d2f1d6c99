# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from vmfork.daemon.loop import Loop
from vmfork.daemon.timer import Timer


def test_it_calls_at_its_interval_until_it_is_stopped() -> None:
    loop = Loop()
    calls: list[str] = []
    timer = Timer(loop, probe=loop.stop)

    def tick() -> None:
        calls.append("tick")
        if len(calls) == 3:
            timer.stop()
            loop.after(0.1, loop.stop)

    timer.every(0.01, tick)
    loop.run()
    assert calls == ["tick"] * 3
    assert not timer.runs


def test_another_action_takes_the_place_of_the_old_one() -> None:
    loop = Loop()
    timer = Timer(loop, probe=loop.stop)
    calls: list[str] = []
    timer.every(0.01, lambda: calls.append("old"))
    timer.every(0.02, loop.stop)
    loop.run()
    assert calls == []


def test_it_looks_again_for_what_failed_and_only_once_for_one_failure() -> None:
    loop = Loop()
    probes: list[str] = []

    def probe() -> None:
        probes.append("probe")
        loop.after(0.05, loop.stop)

    timer = Timer(loop, probe=probe)
    timer.note_failed(failed=True)
    timer.note_failed(failed=True)
    loop.run()
    assert probes == ["probe"]


def test_nothing_is_looked_for_while_nothing_failed() -> None:
    loop = Loop()
    timer = Timer(loop, probe=loop.stop)
    timer.note_failed(failed=False)
    assert not timer.runs
    assert loop._patience() is None
