# SPDX-License-Identifier: Apache-2.0
"""What a term of AML can evaluate to here, and the operators on integers.

Integers are never negative; whoever applies an operator cuts the result to the width of the table's integers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from vmfork.truths import aml_code as aml


@dataclass(slots=True)
class Package:
    """A list of values; None where nothing was put, or what was put is not understood."""

    elements: list[Value | None]


@dataclass(frozen=True, slots=True)
class Element:
    """A reference to one place in a package, as Index makes it."""

    package: Package
    index: int


Value = int | str | Package | Element

OPERATORS: dict[int, Callable[[int, int], int]] = {
    aml.ADD: lambda left, right: left + right,
    aml.SUBTRACT: lambda left, right: left - right,
    aml.AND: lambda left, right: left & right,
    aml.OR: lambda left, right: left | right,
    aml.SHIFT_LEFT: lambda left, right: left << right if right < 64 else 0,
    aml.SHIFT_RIGHT: lambda left, right: left >> right if right < 64 else 0,
}
COMPARISONS: dict[int, Callable[[int, int], bool]] = {
    aml.LOGICAL_AND: lambda left, right: bool(left and right),
    aml.LOGICAL_OR: lambda left, right: bool(left or right),
    aml.EQUAL: lambda left, right: left == right,
    aml.GREATER: lambda left, right: left > right,
    aml.LESS: lambda left, right: left < right,
}
