# SPDX-License-Identifier: Apache-2.0
"""What is to be broken on purpose is still there to be broken; `make breaks` and `make torture-breaks` do it."""

from __future__ import annotations

import argparse

import pytest

from support.breaking import TOP
from torture.breaks import BREAKS, Break
from torture.run import classes


@pytest.mark.parametrize("one", BREAKS, ids=lambda one: one.name.replace(" ", "-"))
def test_each_break_of_the_torture_is_made_in_one_place_and_looked_for_in_a_class_that_exists(one: Break) -> None:
    assert (TOP / one.file).read_text().count(one.sound) == 1
    assert one.red in {known.name for known in classes(argparse.Namespace(every=1, fuzz_seconds=1, tests=True))}
