# SPDX-License-Identifier: Apache-2.0
"""A reactor that cannot be started, or not be watched, is said to be so, and leaves no process behind."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from support.limits import descriptors
from vmfork.daemon.loop import Loop
from vmfork.daemon.reactorprocess import ReactorProcess
from vmfork.paths import Paths
from vmfork.reactor import descendants


class FullLoop(Loop):
    """A loop whose epoll has room for nothing more as long as `full` is set."""

    full = True

    def watch(self, descriptor: int, action: Callable[[], None]) -> None:
        if self.full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        super().watch(descriptor, action)


def children() -> set[int]:
    """Those of this process, ended ones that nobody has collected yet too; other tests may have left some."""
    return {one.pid for one in descendants.processes().values() if one.parent == os.getpid()}


@pytest.fixture(autouse=True)
def others() -> Iterator[set[int]]:
    """The children that were there before; at the end of a test there are no more."""
    before = children()
    yield before
    assert children() <= before


def process(loop: Loop, root: Path, *, ends: int = 1) -> tuple[ReactorProcess, list[str]]:
    """One, and what is told of its ends; so many stop the loop."""
    told: list[str] = []

    def ended() -> None:
        told.append("ended")
        if len(told) == ends:
            loop.stop()

    return ReactorProcess(loop, Paths(str(root)), as_unit=False, ended=ended), told


def test_a_child_without_a_descriptor_is_ended_and_reported(tmp_path: Path, others: set[int]) -> None:
    loop = Loop()
    reactor, told = process(loop, tmp_path)
    with descriptors(free=0):
        reactor.start()
    assert children() <= others
    assert "Too many open files" in str(reactor.problem)
    loop.run()
    assert told == ["ended"]


def test_a_child_that_the_loop_cannot_watch_is_ended_and_reported(tmp_path: Path, others: set[int]) -> None:
    loop = FullLoop()
    reactor, told = process(loop, tmp_path)
    lowest_free = os.dup(0)
    os.close(lowest_free)
    reactor.start()
    assert children() <= others
    assert "No space left on device" in str(reactor.problem)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(lowest_free)
    loop.run()
    assert told == ["ended"]


def test_the_next_reactor_that_starts_mends_it(tmp_path: Path) -> None:
    loop = FullLoop()
    reactor, told = process(loop, tmp_path, ends=2)
    reactor.start()
    loop.full = False
    reactor.start()
    assert reactor.problem is None
    # One for the refusal; without a daemon to ask, the reactor ends by itself.
    loop.run()
    assert told == ["ended", "ended"]


def test_a_service_manager_that_refuses_is_reported_until_it_takes_the_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    systemctl = tmp_path / "systemctl"
    systemctl.write_text(f"#!/bin/sh\n[ -e {tmp_path}/well ]\n")
    systemctl.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    loop = Loop()
    said: list[str | None] = []

    def ended() -> None:
        said.append(reactor.problem)
        (tmp_path / "well").touch()
        reactor.start()
        look()

    def look() -> None:
        if reactor.problem is None:
            loop.stop()
        else:
            loop.after(0.01, look)

    reactor = ReactorProcess(loop, Paths(str(tmp_path)), as_unit=True, ended=ended)
    reactor.start()
    loop.run()
    assert said == ["the reactor cannot be started: systemctl restart vmfork-react.service ended with exit status 1"]
