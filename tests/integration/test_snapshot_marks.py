# SPDX-License-Identifier: Apache-2.0
"""The mark of a template where a disk refuses it: prepare fails and says so, nothing else stops, nobody is a template
by mistake.

What refuses here is a directory in the place of a mark: no file can be put there, and unlink does not remove it. In the
last test the kernel itself refuses; every third case, `make torture` has them all.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support.fakeguest import FakeGuest
from support.runningdaemon import RunningDaemon, eventually, write_hook
from support.tools import need_ptrace
from torture.markfaults import MarkFault, mark_cases
from torture.table import Row


def policy(event: dict[str, Any]) -> str:
    return str(event["identity"]["policy"])


@pytest.mark.parametrize("refused", ["template_mark", "template_mark_run"])
def test_a_mark_that_cannot_be_left_fails_prepare_and_makes_no_template(guest: FakeGuest, refused: str) -> None:
    path = Path(getattr(guest.paths, refused))
    path.mkdir()
    with RunningDaemon(guest) as daemon:
        run = daemon.ctl("prepare", "--template")
        assert run.returncode == 1
        assert f"cannot be declared a template: {path}: Is a directory" in run.stderr
        marks = (guest.paths.template_mark, guest.paths.template_mark_run)
        assert not any(os.path.isfile(mark) for mark in marks)
        assert daemon.ctl("resume").stderr == "nothing was prepared\n"
        guest.fork(os.urandom(16))
        assert policy(daemon.settled(2)) == "keep"


def test_a_mark_that_cannot_be_removed_is_a_problem_until_it_is(guest: FakeGuest) -> None:
    mark = Path(guest.paths.template_mark)
    mark.mkdir()
    with RunningDaemon(guest) as daemon:
        guest.fork(os.urandom(16))
        assert policy(daemon.settled(2)) == "rotate"
        assert any(str(mark) in problem for problem in daemon.status()["problems"])
        mark.rmdir()
        eventually(lambda: daemon.status()["problems"] == [])


def test_a_mark_that_cannot_be_removed_rotates_no_second_time(guest: FakeGuest) -> None:
    mark = Path(guest.paths.template_mark)
    mark.mkdir()
    with RunningDaemon(guest) as daemon:
        guest.fork(os.urandom(16))
        assert policy(daemon.settled(2)) == "rotate"
        daemon.kill()
        daemon.start()
        assert any(str(mark) in problem for problem in daemon.status()["problems"])
        guest.fork(os.urandom(16))
        assert policy(daemon.settled(3)) == "keep"


def test_a_mark_that_cannot_be_removed_keeps_no_snapshot_from_being_called_off(guest: FakeGuest) -> None:
    write_hook(guest, "10-a", 'echo "$1" >>"$VMFORK_ROOT/ran"')
    mark = Path(guest.paths.template_mark)
    with RunningDaemon(guest) as daemon:
        assert daemon.ctl("prepare").returncode == 0
        mark.mkdir()
        assert daemon.ctl("resume").returncode == 0
        assert (guest.root / "ran").read_text().split() == ["before-snapshot", "after-snapshot"]
        assert any(str(mark) in problem for problem in daemon.status()["problems"])


def test_a_guest_whose_old_mark_was_used_up_may_become_a_template_again(guest: FakeGuest) -> None:
    mark = Path(guest.paths.template_mark)
    mark.mkdir()
    with RunningDaemon(guest) as daemon:
        guest.fork(os.urandom(16))
        assert policy(daemon.settled(2)) == "rotate"
        mark.rmdir()
        assert daemon.ctl("prepare", "--template").returncode == 0
        guest.fork(os.urandom(16))
        assert policy(daemon.settled(3)) == "rotate"


@pytest.mark.parametrize(
    ("play", "fault"), mark_cases()[::3], ids=lambda value: getattr(value, "__name__", str(value)).replace(" ", "-")
)
def test_no_mark_stays_or_is_believed_in_while_the_detector_meets(
    play: Callable[[MarkFault], Row], fault: MarkFault
) -> None:
    need_ptrace()
    assert play(fault).violations == []
