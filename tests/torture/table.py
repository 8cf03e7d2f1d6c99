# SPDX-License-Identifier: Apache-2.0
"""What one class of faults was held against, and the table that all of them end in."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

_HEADS = ("fault class", "cases", "forks sent", "forks seen", "hooks run", "violations", "note")


@dataclass(slots=True, kw_only=True)
class Row:
    """One class of faults: how much was tried, and each broken promise as a sentence.

    Every fork that is sent has to be seen. `coalesces` is for forks that nobody could have waited for one by one: of
    these the last has to be seen, and no more than were sent.
    """

    name: str
    cases: int = 0
    sent: int = 0
    seen: int = 0
    hooks: int = 0
    violations: list[str] = field(default_factory=list)
    note: str = ""
    coalesces: bool = False

    def add(self, other: Row) -> None:
        """Count another row of the same class into this one."""
        other.balance()
        self.cases += other.cases
        self.sent += other.sent
        self.seen += other.seen
        self.hooks += other.hooks
        self.violations += other.violations
        self.coalesces = self.coalesces or other.coalesces

    def check(self, holds: bool, sentence: str) -> None:
        """Note a violation, once, unless the promise holds."""
        told = f"{self.name}: {sentence}"
        if not holds and told not in self.violations:
            self.violations.append(told)

    def balance(self) -> None:
        """Hold the forks that were seen against those that were sent: nothing is lost, nothing invented."""
        fewest = min(1, self.sent) if self.coalesces else self.sent
        self.check(fewest <= self.seen <= self.sent, f"{self.sent} forks were sent, {self.seen} seen")

    def cells(self) -> tuple[str, ...]:
        numbers = (self.cases, self.sent, self.seen, self.hooks, len(self.violations))
        return (self.name, *map(str, numbers), self.note)


def render(rows: Iterable[Row]) -> str:
    """All rows as a table, numbers to the right, a sum at the end."""
    rows = list(rows)
    total = Row(name="total")
    for row in rows:
        total.add(row)
    if total.coalesces:
        total.note = "forks sent and seen differ in rows that coalesce, nowhere else"
    return aligned([_HEADS, *(row.cells() for row in rows), total.cells()])


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Lines of cells as a table: the first column and the last to the left, numbers to the right."""
    last = len(lines[0]) - 1
    widths = [max(len(line[column]) for line in lines) for column in range(last + 1)]

    def cell(line: Sequence[str], column: int) -> str:
        return line[column].ljust(widths[column]) if column in (0, last) else line[column].rjust(widths[column])

    return "\n".join("  ".join(cell(line, column) for column in range(last + 1)).rstrip() for line in lines)
