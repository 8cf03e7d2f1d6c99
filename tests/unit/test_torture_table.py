# SPDX-License-Identifier: Apache-2.0
"""The torture's own books: what does not balance, hangs or dies is a violation, whoever forgot to compare."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from torture.bounded import FaultClass, bounded
from torture.run import tried
from torture.table import Row, render


def a_class(rows: Callable[[], Iterator[Row]], *, bound_sec: float = 60) -> FaultClass:
    return FaultClass(name="a class", bound_sec=bound_sec, rows=rows)


@pytest.mark.parametrize("seen", [2, 4], ids=["lost", "invented"])
def test_other_forks_seen_than_sent_are_a_violation(seen: int) -> None:
    (row,) = bounded(a_class(lambda: iter([Row(name="x", sent=3, seen=seen)])))
    assert row.violations == [f"x: 3 forks were sent, {seen} seen"]


def test_a_case_that_lost_a_fork_is_not_made_up_for_by_one_that_invented_one() -> None:
    row = Row(name="both")
    row.add(Row(name="lost", sent=2, seen=1))
    row.add(Row(name="invented", sent=1, seen=2))
    row.balance()
    assert row.violations == ["lost: 2 forks were sent, 1 seen", "invented: 1 forks were sent, 2 seen"]


@pytest.mark.parametrize(("seen", "holds"), [(0, False), (1, True), (3, True), (4, False)])
def test_forks_that_coalesce_are_at_least_one_and_none_is_invented(seen: int, *, holds: bool) -> None:
    row = Row(name="burst", sent=3, seen=seen, coalesces=True)
    row.balance()
    assert (row.violations == []) == holds


def test_the_table_ends_in_sums() -> None:
    last = render([Row(name="a", cases=1, sent=2, seen=2), Row(name="b", cases=3, sent=4, seen=4)]).splitlines()[-1]
    assert last.split() == ["total", "4", "6", "6", "0", "0"]


def test_a_class_that_hangs_is_ended_with_what_it_started_and_the_rows_before_are_kept(tmp_path: Path) -> None:
    def hang() -> Iterator[Row]:
        yield Row(name="done before")
        started = subprocess.Popen(["sleep", "600"])
        (tmp_path / "pid").write_text(str(started.pid))
        started.wait()

    rows = list(bounded(a_class(hang, bound_sec=5)))
    assert [row.name for row in rows] == ["done before", "a class"]
    assert rows[-1].violations == ["a class: did not end within 5 s"]
    assert is_gone(int((tmp_path / "pid").read_text()))


def test_a_class_that_dies_is_a_violation() -> None:
    def die() -> Iterator[Row]:
        os.kill(os.getpid(), signal.SIGKILL)
        yield Row(name="never")

    (row,) = bounded(a_class(die))
    assert row.violations == ["a class: ended by itself before all was tried"]


def test_the_whole_has_a_bound(capsys: pytest.CaptureFixture[str]) -> None:
    rows, _ = tried(iter([a_class(lambda: iter([Row(name="x")]))]), within_sec=0)
    assert len(rows[-1].violations) == 1
    assert rows[-1].violations[0].startswith("the whole: took ")
    assert "x: 0 cases, holds" in capsys.readouterr().err


def is_gone(pid: int) -> bool:
    """Killed; whoever inherited it may take a moment to collect it."""
    end = time.monotonic() + 30
    while time.monotonic() < end:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.01)
    return False
