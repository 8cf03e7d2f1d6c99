# SPDX-License-Identifier: Apache-2.0
"""The short form of the crash matrix: some kill points of each kind; `make torture` tries every one."""

from __future__ import annotations

import pytest

from support.tools import need, need_ptrace
from torture.crash import VICTIMS, Victim, crash_matrix

# A number that is no factor of how many calls one atomic replacement makes, so that each kind of call has its turn.
EVERY = 11


@pytest.mark.parametrize("victim", VICTIMS, ids=lambda victim: victim.name.replace(" ", "-"))
def test_a_kill_at_any_change_loses_no_fork_and_invents_none(victim: Victim) -> None:
    need_ptrace()
    need("flock", package="util-linux")
    (row,) = crash_matrix(every=EVERY, victims=(victim,))
    assert row.violations == []
