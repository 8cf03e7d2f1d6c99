# SPDX-License-Identifier: Apache-2.0
"""What the fuzzer keeps, and the table that it ends in."""

from __future__ import annotations

from pathlib import Path

import pytest

from torture.fuzz import Outcome, fuzz, guided, table
from torture.kept import MOST_BYTES, MOST_FILES, keep, seeds


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    (tmp_path / "a_target").mkdir()
    (tmp_path / "a_target" / "good.txt").write_text("good")
    return tmp_path


def test_what_is_kept_is_read_again(corpus: Path) -> None:
    assert keep("a_target", [b"\xffnew", b"good"], corpus) == 1
    assert set(seeds("a_target", corpus).values()) == {b"good", b"\xffnew"}


def test_the_shortest_are_kept_while_there_is_room_for_their_number(corpus: Path) -> None:
    keep("a_target", [b"x" * length for length in range(1, 100)], corpus)
    kept = seeds("a_target", corpus).values()
    assert (len(kept), max(map(len, kept))) == (MOST_FILES, MOST_FILES - 1)


def test_the_shortest_are_kept_while_there_is_room_for_their_bytes(corpus: Path) -> None:
    keep("a_target", [bytes([number]) * 1000 for number in range(39)], corpus)
    kept = seeds("a_target", corpus).values()
    assert MOST_BYTES - 1000 < sum(map(len, kept)) <= MOST_BYTES


def test_a_search_says_what_it_tried_and_what_it_reached() -> None:
    # A parser of a module that much else imports: it must not have been imported uncounted.
    (outcome,) = fuzz(1, ("page",))
    assert outcome.broken is None, outcome.said
    assert outcome.tried > 0, outcome.said
    assert outcome.edges or not guided(), outcome.said


def test_the_table_names_what_broke_a_target() -> None:
    sound = Outcome(name="sound", tried=10, seconds=2.0, edges=5, corpus=3, kept=1)
    broken = Outcome(name="broken", tried=7, seconds=1.0, broken=b"xyz")
    assert [line.split() for line in table([sound, broken]).splitlines()[1:]] == [
        ["sound", "10", "2", "5", "3", "1", "-"],
        ["broken", "7", "1", "-", "-", "0", "BROKEN", "by", "3", "bytes"],
    ]
