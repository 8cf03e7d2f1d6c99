# SPDX-License-Identifier: Apache-2.0
"""Clocks that jump are no fork, end no hook too early, and keep no deadline from coming."""

from __future__ import annotations

import pytest

from torture.clocks import LEAPS, PAUSED, Leap, during_a_hook, idle, undone_by_itself, with_a_deadline


@pytest.mark.parametrize("leap", [*LEAPS, PAUSED], ids=lambda leap: leap.name.replace(" ", "-"))
def test_a_leap_is_no_fork_and_hides_none(leap: Leap) -> None:
    assert idle(leap).violations == []


@pytest.mark.parametrize("leap", [*LEAPS[:3], PAUSED], ids=lambda leap: leap.name.replace(" ", "-"))
def test_a_hook_that_ran_meanwhile_is_left_to_end(leap: Leap) -> None:
    assert during_a_hook(leap).violations == []


@pytest.mark.parametrize("leap", [LEAPS[1], PAUSED], ids=lambda leap: leap.name.replace(" ", "-"))
def test_deadlines_come_by_the_steady_clock(leap: Leap) -> None:
    assert with_a_deadline(leap).violations == []


@pytest.mark.parametrize("leap", LEAPS[:3], ids=lambda leap: leap.name.replace(" ", "-"))
def test_a_preparation_for_a_snapshot_is_undone_by_the_steady_clock(leap: Leap) -> None:
    assert undone_by_itself(leap).violations == []
