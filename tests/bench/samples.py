# SPDX-License-Identifier: Apache-2.0
"""Measured values and what is said of them: medians with quartiles and the 99th percentile, never a bare mean."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True, kw_only=True)
class Series:
    """All values of one quantity in one unit, in the order in which they were taken.

    `budget` is the most that its median (with `budget_of` "p99": its 99th percentile) may be; None where there is no
    such promise. `peer` marks what others do, `note` says what was measured where that is not plain.
    """

    key: str
    what: str
    unit: str
    values: list[float] = field(default_factory=list)
    budget: float | None = None
    budget_of: str = "median"
    peer: bool = False
    note: str = ""

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    def percentile(self, percent: float) -> float:
        ordered = sorted(self.values)
        return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]

    @property
    def quartiles(self) -> tuple[float, float]:
        return self.percentile(25), self.percentile(75)

    @property
    def judged(self) -> float:
        """The number that the budget is about."""
        return self.median if self.budget_of == "median" else self.percentile(99)

    @property
    def kept(self) -> bool | None:
        return None if self.budget is None else self.judged <= self.budget

    def to_json(self) -> dict[str, Any]:
        return {
            "key": self.key,
            "what": self.what,
            "unit": self.unit,
            "values": [float(f"{value:.6g}") for value in self.values],
            "budget": self.budget,
            "budget_of": self.budget_of,
            "peer": self.peer,
            "note": self.note,
        }

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Series:
        return cls(**fields)


@dataclass(slots=True, kw_only=True)
class Curve:
    """How a cost grows: (size, cost) points. `exponent` is the slope in log-log of its upper half: 1 is linear."""

    key: str
    what: str
    over: str
    unit: str
    points: list[tuple[float, float]] = field(default_factory=list)

    @property
    def per_item(self) -> float:
        """The cost of one more, between the smallest and the largest size."""
        (first, low), (last, high) = self.points[0], self.points[-1]
        return (high - low) / (last - first)

    @property
    def bend(self) -> float:
        """The cost per item in the last step over that between first and last: 1 is a straight line."""
        (before, low), (last, high) = self.points[-2:]
        straight = self.per_item
        return ((high - low) / (last - before)) / straight if straight > 0 else 0.0

    def to_json(self) -> dict[str, Any]:
        points = [[size, float(f"{cost:.6g}")] for size, cost in self.points]
        return {"key": self.key, "what": self.what, "over": self.over, "unit": self.unit, "points": points}

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Curve:
        points = [(float(size), float(cost)) for size, cost in fields.pop("points")]
        return cls(**fields, points=points)


@dataclass(slots=True, kw_only=True)
class Chapter:
    """What one module of the bench found; `remarks` are sentences for the reader."""

    name: str
    series: list[Series] = field(default_factory=list)
    curves: list[Curve] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    def __getitem__(self, key: str) -> Series:
        return next(one for one in self.series if one.key == key)

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "series": [one.to_json() for one in self.series],
            "curves": [one.to_json() for one in self.curves],
            "remarks": self.remarks,
        }

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Chapter:
        return cls(
            name=fields["name"],
            series=[Series.from_json(one) for one in fields["series"]],
            curves=[Curve.from_json(one) for one in fields["curves"]],
            remarks=list(fields["remarks"]),
        )


def ratio(key: str, what: str, above: Series, below: Series, *, budget: float | None = None) -> Series:
    """The ratio of two medians as a series of one value."""
    return Series(key=key, what=what, unit="x", values=[above.median / below.median], budget=budget)
