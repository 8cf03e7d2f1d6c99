# SPDX-License-Identifier: Apache-2.0
"""What `make chain` says of the figures that it noted; no virtual machine is needed for that."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from chain import Link, growth


def problems(figures: Iterable[tuple[int, int]]) -> list[str]:
    """The verdict on links with so much memory and so many descriptors."""
    links = [
        Link(
            generation=number + 2,
            rss_kib=rss,
            threads=1,
            descriptors=descriptors,
            state=500,
            history=1000,
            latency_us=1000,
            seconds=1.0,
        )
        for number, (rss, descriptors) in enumerate(figures)
    ]
    return list(growth(links))


@pytest.mark.parametrize("at", [12, 20, 24])
def test_a_connection_that_happens_to_be_open_is_no_growth(at: int) -> None:
    assert problems((18000, 21 if number == at else 20) for number in range(25)) == []


@pytest.mark.parametrize("restores", [25, 500])
def test_a_descriptor_that_is_left_open_in_a_while_is_found(restores: int) -> None:
    assert problems((18000, 20 + number * 25 // restores) for number in range(restores)) != []


def test_what_is_held_only_since_the_middle_of_a_short_chain_is_found() -> None:
    """The last ten of 25 links and the ten after the settling have five in common."""
    (problem,) = problems((18000 + 1100 * (number >= 18), 20) for number in range(25))
    assert problem == "rss_kib grew from 18000 to 19100"


def test_figures_that_stay_are_no_problem() -> None:
    assert problems((18000 + number % 3 * 100, 20) for number in range(25)) == []
