# SPDX-License-Identifier: Apache-2.0
"""A daemon that cannot start its reactor says so in `status`, and reacts as soon as it can."""

from __future__ import annotations

import sys
from pathlib import Path

from support.tools import need_ptrace
from torture.injection import Attached, strace_of
from torture.liveguest import LiveGuest
from torture.scenario import LAUNCH, interpreter


def children(pid: int) -> list[str]:
    """The states of a process's children, `Z` for one that nobody collected."""
    states = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[1]) == pid:
            states.append(fields[0])
    return states


def problem(live: LiveGuest) -> str:
    """Wait until `status` names one."""
    found: list[str] = []

    def look() -> bool:
        found.extend(live.problems())
        return found != []

    live.until(look, "status names a problem")
    return found[0]


def test_a_reactor_that_is_not_there_is_a_problem_until_it_is() -> None:
    with LiveGuest("no reactor") as live:
        live.words = [sys.executable, "-c", LAUNCH, str(live.top / "python")]
        live.start()
        live.fork()
        assert problem(live) == f"the reactor cannot be started: {live.top}/python: No such file or directory"
        assert live.ran() == []
        interpreter(live.top, [], first=1, last=0)
        live.until(lambda: live.ran() == ["2"] and live.is_over(), "the hook ran")
        live.until(lambda: live.problems() == [], "status names no problem any more")


def test_a_reactor_that_cannot_be_watched_is_a_problem_and_no_zombie() -> None:
    need_ptrace()
    with LiveGuest("no descriptor for the reactor") as live:
        pid = live.start()
        with Attached(strace_of(pid, ["pidfd_open"], "error=EMFILE", [])):
            live.fork()
            assert "Too many open files" in problem(live)
            assert children(pid) == []
            assert live.ran() == []
        live.until(lambda: live.ran() == ["2"] and live.is_over(), "the hook ran, once")
        live.until(lambda: live.problems() == [], "status names no problem any more")


def test_a_reactor_that_comes_to_no_result_is_a_problem_until_one_does() -> None:
    with LiveGuest("no result") as live:
        broken = interpreter(live.top, ["false"], first=1, last=1000)
        live.words = [sys.executable, "-c", LAUNCH, str(broken)]
        live.start()
        live.fork()
        assert "has no result after" in problem(live)
        interpreter(live.top, [], first=1, last=0)
        live.until(lambda: live.ran() == ["2"] and live.is_over(), "the hook ran")
        live.until(lambda: live.problems() == [], "status names no problem any more")
