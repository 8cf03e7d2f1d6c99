# SPDX-License-Identifier: Apache-2.0
"""Measured values and what is said of them: medians with quartiles and the 99th percentile, never a bare mean."""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


def percentile(values: list[float], percent: float) -> float:
    """The value that so many percent are below."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]


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
        return percentile(self.values, percent)

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
    """How a cost grows: for each size, smallest first, all values that were measured."""

    key: str
    what: str
    over: str
    unit: str
    samples: list[tuple[float, list[float]]] = field(default_factory=list)

    @property
    def points(self) -> list[tuple[float, float]]:
        """Each size and the median of its cost."""
        return [(size, statistics.median(values)) for size, values in self.samples]

    @property
    def spread(self) -> list[tuple[float, float]]:
        """The quartiles of each size."""
        return [(percentile(values, 25), percentile(values, 75)) for _, values in self.samples]

    @property
    def bend(self) -> float | None:
        """The cost of one more in the last step over that of one more before it: 1 is a straight line.

        Not over the average of all: the last step is most of that, so that even a square stays near 1. None where the
        largest costs no more than the smallest does at times: there is nothing that grows. Infinite where it begins to
        grow in the last step.
        """
        if len(self.samples) < 3 or self.spread[-1][0] <= self.spread[0][1]:
            return None
        (first, least), *_, (before, low), (last, high) = self.points
        earlier = (low - least) / (before - first)
        return (high - low) / (last - before) / earlier if earlier > 0 else math.inf

    def to_json(self) -> dict[str, Any]:
        samples = [[size, [float(f"{value:.6g}") for value in values]] for size, values in self.samples]
        return {"key": self.key, "what": self.what, "over": self.over, "unit": self.unit, "samples": samples}

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Curve:
        samples = [(float(size), [float(value) for value in values]) for size, values in fields["samples"]]
        return cls(**{**fields, "samples": samples})


@dataclass(slots=True, kw_only=True)
class Chapter:
    """What one module of the bench found; `remarks` are sentences for the reader, `machine` says where and when."""

    name: str
    series: list[Series] = field(default_factory=list)
    curves: list[Curve] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    machine: dict[str, str] = field(default_factory=dict)

    def __getitem__(self, key: str) -> Series:
        return next(one for one in self.series if one.key == key)

    def to_json(self) -> dict[str, Any]:
        return {
            "machine": self.machine,
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
            machine=dict(fields["machine"]),
        )


def kept(paths: Iterable[Path]) -> Iterator[Chapter]:
    """The chapters of earlier runs, those that there are; what an older bench wrote otherwise is named and left out."""
    for path in paths:
        if not path.exists():
            continue
        try:
            yield Chapter.from_json(json.loads(path.read_text()))
        except (ValueError, KeyError, TypeError) as error:
            print(f"bench: {path}: not of this version, measure it again: {error!r}", file=sys.stderr)


def ratio(key: str, what: str, above: Series, below: Series, *, budget: float | None = None) -> Series:
    """The ratio of two medians as a series of one value."""
    return Series(key=key, what=what, unit="x", values=[above.median / below.median], budget=budget)
