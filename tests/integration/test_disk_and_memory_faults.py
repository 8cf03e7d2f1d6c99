# SPDX-License-Identifier: Apache-2.0
"""A disk or memory that refuses costs no fork: page, watchers and hooks first, and what was missed is written later."""

from __future__ import annotations

import pytest

from support.tools import need_ptrace
from torture.faults import Fault, ReactorFault, detector_faults, play_detector, play_reactor, reactor_faults

# Here every third case; `make torture` has them all.
EVERY = 3


@pytest.mark.parametrize("fault", detector_faults()[::EVERY], ids=lambda fault: fault.name.replace(" ", "-"))
def test_a_fork_is_told_and_later_written_while_the_detector_meets(fault: Fault) -> None:
    need_ptrace()
    assert play_detector(fault).violations == []


@pytest.mark.parametrize("fault", reactor_faults()[::EVERY], ids=lambda fault: str(fault).replace(" ", "-"))
def test_hooks_run_while_the_reactor_meets(fault: ReactorFault) -> None:
    need_ptrace()
    assert play_reactor(fault).violations == []
