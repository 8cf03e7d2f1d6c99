# SPDX-License-Identifier: Apache-2.0
"""A disk or memory that refuses costs no fork: page, watchers and hooks first, and what was missed is written later."""

from __future__ import annotations

import pytest

from support.tools import need, need_ptrace, need_root
from torture.faults import Fault, ReactorFault, detector_faults, play_detector, play_reactor, reactor_faults
from torture.filesystems import PLAYS, play_file_system
from torture.starts import StartFault, play_start, start_faults

# Here every third case; `make torture` has them all.
EVERY = 3
# These are more, and quicker.
EVERY_START = 7


@pytest.mark.parametrize("fault", detector_faults()[::EVERY], ids=lambda fault: fault.name.replace(" ", "-"))
def test_a_fork_is_told_and_later_written_while_the_detector_meets(fault: Fault) -> None:
    need_ptrace()
    assert play_detector(fault).violations == []


@pytest.mark.parametrize("fault", reactor_faults()[::EVERY], ids=lambda fault: str(fault).replace(" ", "-"))
def test_hooks_run_while_the_reactor_meets(fault: ReactorFault) -> None:
    need_ptrace()
    assert play_reactor(fault).violations == []


@pytest.mark.parametrize("fault", start_faults()[::EVERY_START], ids=lambda fault: fault.name.replace(" ", "-"))
def test_a_fork_from_before_is_handled_whatever_the_start_meets(fault: StartFault) -> None:
    need_ptrace()
    need("flock", package="util-linux")
    assert play_start(fault).violations == []


@pytest.mark.parametrize("name", PLAYS)
def test_a_fork_from_before_is_handled_on(name: str) -> None:
    need_root()
    need("unshare", package="util-linux")
    need("flock", package="util-linux")
    assert play_file_system(name).violations == []
