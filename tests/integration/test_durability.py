# SPDX-License-Identifier: Apache-2.0
"""What a power cut leaves of one fork: each file is on the disk before the next step relies on it."""

from __future__ import annotations

import re
import sys
from functools import partial

import pytest

from support.runningdaemon import eventually
from support.tools import need_ptrace
from torture.injection import strace
from torture.liveguest import LiveGuest

_CALLS = ("write", "fsync", "fdatasync", "rename")
# With -y a descriptor is followed by its path; a rename names the new path last.
_CALL = re.compile(r'(\w+)\((?:\d+<(?P<held>[^>]*)>|"[^"]*", "(?P<named>[^"]*)")')
_ENDED = "+++ exited with 0 +++"


def calls(log: str, directory: str) -> list[str]:
    """The calls on files below a directory, or on itself (`.`); a write in several pieces is one."""
    found: list[str] = []
    for line in log.splitlines():
        match = _CALL.match(line)
        path = (match["held"] or match["named"]) if match else ""
        if match and (path == directory or path.startswith(f"{directory}/")):
            call = f"{match[1]} {path[len(directory) + 1 :] or '.'}"
            if found[-1:] != [call]:
                found.append(call)
    return found


@pytest.fixture(scope="module")
def done() -> list[str]:
    """What a daemon did to /var for its first start and two forks."""
    need_ptrace()
    with LiveGuest("durability") as live:
        log = live.top / "calls"
        live.words = [*strace(log=log, trace=_CALLS), "-y", sys.executable, "-m", "vmfork.daemon"]
        live.start()
        for generation in (2, 3):
            live.until(partial(live.is_written, generation, live.fork()), "the fork is written")
        assert live.process is not None
        live.process.terminate()
        assert live.process.wait(60) == 0
        # strace writes that after the daemon has gone.
        eventually(lambda: _ENDED in log.read_text())
        return calls(log.read_text(), live.guest.paths.state_dir)


REPLACED = ["write state.json.new", "fsync state.json.new", "rename state.json", "fsync ."]


def test_a_handled_fork_is_in_the_history_before_the_state_says_so(done: list[str]) -> None:
    assert done[-6:] == ["write history.jsonl", "fdatasync history.jsonl", *REPLACED]


def test_the_state_is_on_the_disk_before_it_takes_its_name_and_its_name_before_anything_else(done: list[str]) -> None:
    renames = [place for place, call in enumerate(done) if call == "rename state.json"]
    assert len(renames) >= 4
    assert [done[place - 2 : place + 2] for place in renames] == [REPLACED] * len(renames)


def test_nothing_else_is_written_there(done: list[str]) -> None:
    assert set(done) == {*REPLACED, "write history.jsonl", "fdatasync history.jsonl"}
