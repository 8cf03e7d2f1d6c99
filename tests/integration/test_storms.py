# SPDX-License-Identifier: Apache-2.0
"""The short form of the storms: each fork that can be told apart counts once, whenever it comes."""

from __future__ import annotations

import pytest

from support.tools import need_ptrace
from torture.storms import at_bad_moments, burst, flood, flood_with_overruns, in_a_row, overruns


def test_a_thousand_forks_in_a_row_are_a_thousand_and_cost_no_memory() -> None:
    row = in_a_row(1000, warm_up=200)
    assert (row.violations, row.sent, row.seen) == ([], 1000, 1000)


def test_of_forks_that_nobody_waits_for_the_last_is_seen() -> None:
    row = burst(200)
    row.balance()
    assert row.violations == []


def test_a_flood_of_foreign_lines_hides_no_fork() -> None:
    row = flood(100_000, 10)
    assert (row.violations, row.sent, row.seen) == ([], 10, 10)


@pytest.mark.parametrize("readable", [True, False], ids=["id-readable", "id-unreadable"])
def test_lost_records_in_a_flood_neither_hide_a_fork_nor_make_two_of_one(*, readable: bool) -> None:
    need_ptrace()
    row = flood_with_overruns(20_000, 30, readable=readable)
    assert (row.violations, row.sent, row.seen) == ([], 30, 30)


def test_lost_records_neither_hide_a_fork_nor_make_one() -> None:
    need_ptrace()
    for row in overruns(5):
        assert (row.violations, row.sent, row.seen) == ([], 5, 5)


def test_a_fork_at_a_bad_moment_counts_once() -> None:
    for row in at_bad_moments(8):
        assert (row.violations, row.sent, row.seen) == ([], 8, 8)
