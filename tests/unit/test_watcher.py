# SPDX-License-Identifier: Apache-2.0
"""Watchers against a real varlink service: what they tell, also over restarts, and how event loops use them."""

from __future__ import annotations

import asyncio
import os
import select
import selectors
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import vmfork
from support.forkservice import DEADLINE, ForkService, until
from vmfork.model import EventState


@pytest.fixture
def service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ForkService]:
    monkeypatch.setenv("VMFORK_ROOT", str(tmp_path))
    with ForkService(tmp_path) as running:
        yield running


def readable(watcher: vmfork.Watcher, seconds: float = DEADLINE) -> bool:
    return bool(select.select([watcher], [], [], seconds)[0])


def next_event(watcher: vmfork.Watcher) -> vmfork.ForkEvent:
    give_up_at = time.monotonic() + DEADLINE
    while time.monotonic() < give_up_at:
        assert readable(watcher)
        event = watcher.read()
        if event is not None:
            return event
    raise AssertionError("waited in vain for a fork")


def test_without_a_daemon_a_watcher_is_unavailable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VMFORK_ROOT", str(tmp_path))
    with pytest.raises(vmfork.Unavailable):
        vmfork.Watcher()


def test_a_watcher_that_failed_leaves_no_descriptor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VMFORK_ROOT", str(tmp_path))
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        with pytest.raises(vmfork.Unavailable):
            vmfork.Watcher()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_closed_watcher_leaves_no_descriptor(service: ForkService) -> None:
    with vmfork.Watcher():
        pass
    service.await_subscribers(0)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        with vmfork.Watcher():
            pass
    service.await_subscribers(0)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_fork_that_comes_with_the_hello_makes_the_descriptor_readable(service: ForkService) -> None:
    service.forks_at_hello = True
    with vmfork.Watcher() as watcher:
        assert readable(watcher, 5)
        event = watcher.read()
        assert event is not None
        assert event.generation == 2
        assert not readable(watcher, 0.05)


def test_read_without_a_fork_is_none(service: ForkService) -> None:
    with vmfork.Watcher() as watcher:
        assert watcher.read() is None
        assert not readable(watcher, 0.05)


def test_a_fork_is_read_with_all_that_the_daemon_said(service: ForkService) -> None:
    with vmfork.Watcher() as watcher:
        event = service.fork()
        assert next_event(watcher) == event
        assert watcher.read() is None


def test_an_old_fork_is_not_told(service: ForkService) -> None:
    service.fork()
    with vmfork.Watcher() as watcher:
        assert watcher.read() is None


def test_one_read_for_each_readiness_gets_every_fork(service: ForkService) -> None:
    with vmfork.Watcher() as watcher:
        for _ in range(20):
            service.fork()
        told: list[int] = []
        while len(told) < 20:
            assert readable(watcher), "forks are left, but the descriptor is not readable"
            event = watcher.read()
            if event is not None:
                told.append(event.generation)
        assert told == list(range(2, 22))
        watcher.read()
        assert not readable(watcher, 0.05)


def test_a_watcher_is_an_iterator(service: ForkService) -> None:
    with vmfork.Watcher() as watcher:
        threading.Timer(0.05, service.fork).start()
        for event in watcher:
            assert event.generation == 2
            break


def test_the_descriptor_stays_over_a_restart_and_no_fork_is_lost(service: ForkService) -> None:
    with vmfork.Watcher() as watcher:
        descriptor = watcher.fileno()
        service.stop()
        service.fork(tell=False)
        missed = service.fork(tell=False)
        service.start()
        assert next_event(watcher) == missed
        later = service.fork()
        assert next_event(watcher) == later
        assert watcher.fileno() == descriptor


def test_a_fork_that_a_restarted_daemon_cannot_describe_is_told(service: ForkService) -> None:
    with vmfork.Watcher() as watcher:
        service.stop()
        missed = service.fork(tell=False)
        service.last = None
        service.start()
        event = next_event(watcher)
        assert (event.generation, event.token) == (missed.generation, missed.token)


def test_a_restart_without_a_fork_tells_nothing(service: ForkService) -> None:
    first = service.fork()
    with vmfork.Watcher() as watcher:
        service.stop()
        service.start()
        give_up_at = time.monotonic() + DEADLINE
        while not service.subscribers and time.monotonic() < give_up_at:
            assert watcher.read() is None
            readable(watcher, 0.01)
        later = service.fork()
        assert next_event(watcher) == later
        assert later.generation == first.generation + 1


def test_an_idle_watcher_without_a_daemon_is_not_readable_all_the_time(service: ForkService) -> None:
    with vmfork.Watcher() as watcher:
        service.stop()
        wakeups = 0
        give_up_at = time.monotonic() + 0.3
        while time.monotonic() < give_up_at:
            if readable(watcher, 0.05):
                wakeups += 1
                watcher.read()
        assert wakeups <= 2


def test_ack_of_a_tracked_watcher_reaches_the_daemon(service: ForkService) -> None:
    with vmfork.Watcher(track=True) as watcher:
        service.fork()
        watcher.ack(next_event(watcher))
        service.await_acknowledgement(2)


def test_ack_of_an_untracked_watcher_says_nothing(service: ForkService) -> None:
    with vmfork.Watcher() as watcher, vmfork.Watcher(track=True) as tracked:
        service.fork()
        watcher.ack(next_event(watcher))
        tracked.ack(next_event(tracked))
        service.await_acknowledgement(2)
        assert service.acknowledged == [(2, None)]


def test_ack_while_the_daemon_is_away_is_repeated(service: ForkService) -> None:
    with vmfork.Watcher(track=True) as watcher:
        service.fork()
        event = next_event(watcher)
        service.stop()
        watcher.read()
        watcher.ack(event)
        service.start()
        # What came back is taken up by reading, as whoever waits on the descriptor does.
        until(
            lambda: watcher.read() is None and (2, None) in service.acknowledged, "the acknowledgement to be repeated"
        )


def test_a_tracked_watcher_is_ready_for_a_snapshot(service: ForkService) -> None:
    with vmfork.Watcher(track=True) as watcher:
        service.tell("before-snapshot", snapshot=5)
        assert readable(watcher)
        assert watcher.read() is None
        service.await_acknowledgement(1, 5)


def test_a_watcher_that_may_not_be_tracked_is_unavailable(service: ForkService) -> None:
    service.refuses_tracked = True
    with pytest.raises(vmfork.Unavailable):
        vmfork.Watcher(track=True)


def test_a_watcher_is_not_used_by_a_child_of_fork(service: ForkService) -> None:
    with vmfork.Watcher() as watcher:
        child = os.fork()
        if child == 0:
            try:
                watcher.read()
            except RuntimeError:
                os._exit(7)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        service.fork()
        assert next_event(watcher).generation == 2


def test_asyncio_is_told_through_add_reader(service: ForkService) -> None:
    async def first_fork() -> vmfork.ForkEvent:
        loop = asyncio.get_running_loop()
        found: asyncio.Future[vmfork.ForkEvent] = loop.create_future()
        with vmfork.Watcher() as watcher:

            def on_readable() -> None:
                event = watcher.read()
                if event is not None and not found.done():
                    found.set_result(event)

            loop.add_reader(watcher, on_readable)
            try:
                loop.call_later(0.02, service.fork)
                return await asyncio.wait_for(found, DEADLINE)
            finally:
                loop.remove_reader(watcher)

    assert asyncio.run(first_fork()).generation == 2


@pytest.mark.parametrize(
    "selector",
    [selectors.SelectSelector, selectors.PollSelector, selectors.EpollSelector],
    ids=lambda kind: kind.__name__,
)
def test_selectors_are_told(service: ForkService, selector: type[selectors.BaseSelector]) -> None:
    with vmfork.Watcher() as watcher, selector() as waiting:
        waiting.register(watcher, selectors.EVENT_READ)
        service.fork()
        assert waiting.select(DEADLINE)
        event = watcher.read()
        assert event is not None
        assert event.generation == 2


def test_wait_returns_a_fork_that_has_already_happened(service: ForkService) -> None:
    event = service.fork()
    assert vmfork.wait(after=1, timeout=DEADLINE) == event


def test_wait_without_after_does_not_return_an_old_fork(service: ForkService) -> None:
    service.fork()
    assert vmfork.wait(timeout=0.05) is None


def test_wait_is_told_of_a_fork_to_come(service: ForkService) -> None:
    threading.Timer(0.05, service.fork).start()
    event = vmfork.wait(timeout=DEADLINE)
    assert event is not None
    assert event.generation == 2


def test_wait_without_a_daemon_is_unavailable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VMFORK_ROOT", str(tmp_path))
    with pytest.raises(vmfork.Unavailable):
        vmfork.wait(timeout=0.1)


def test_settled_is_not_answered_before_the_fork_was_noticed(service: ForkService) -> None:
    assert vmfork.settled(after=1, timeout=0.1) is None


def test_settled_is_not_answered_during_the_reaction(service: ForkService) -> None:
    service.fork()
    assert vmfork.settled(after=1, timeout=0.1) is None


def test_settled_waits_for_the_end_of_the_reaction(service: ForkService) -> None:
    service.fork()
    threading.Timer(0.05, service.settle).start()
    event = vmfork.settled(after=1, timeout=DEADLINE)
    assert event is not None
    assert (event.generation, event.state) == (2, EventState.SETTLED)


def test_settled_is_answered_at_once_after_the_reaction(service: ForkService) -> None:
    service.fork()
    service.settle()
    event = vmfork.settled(after=1, timeout=DEADLINE)
    assert event is not None
    assert event.state is EventState.SETTLED


def test_settled_outlives_a_restart_of_the_daemon(service: ForkService) -> None:
    service.fork()

    def restart() -> None:
        service.stop()
        service.start()
        service.settle()

    threading.Timer(0.05, restart).start()
    event = vmfork.settled(after=1, timeout=DEADLINE)
    assert event is not None
    assert event.state is EventState.SETTLED


def test_a_failed_reaction_is_no_all_clear(service: ForkService) -> None:
    service.fork()
    service.settle(EventState.FAILED)
    with pytest.raises(vmfork.VmforkError, match="failed"):
        vmfork.settled(after=1, timeout=DEADLINE)
