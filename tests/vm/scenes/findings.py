# SPDX-License-Identifier: Apache-2.0
"""What a scene found out: a row for each guest, remarks, and whatever was not as it should be; and how that is printed.

A row is for people: identifiers are cut to a few digits, what does not apply is a dash.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields

_DIGITS = 6
_NONE = "-"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One guest. `id` is what the hypervisor told it; the rest is what vmfork and a process in the guest said."""

    guest: str
    id: str = _NONE
    forks: str = _NONE
    edge: str = _NONE
    after: str = _NONE
    gen: str = _NONE
    token: str = _NONE
    random: str = _NONE
    uuid4: str = _NONE
    urandom: str = _NONE
    hooks: str = _NONE


@dataclass(slots=True, kw_only=True)
class Findings:
    """Filled while a scene is played; `problems` is empty when everything was as it should be.

    `control_is_quiet` is None as long as nobody has looked.
    """

    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    clones: int = 0
    noticed: int = 0
    control_is_quiet: bool | None = None

    def expect(self, fact: bool, otherwise: str) -> bool:
        """Note a problem unless this is a fact; returns the fact."""
        if not fact:
            self.problems.append(otherwise)
        return fact

    @property
    def verdict(self) -> str:
        """In half a line."""
        control = {True: "no fork", False: "A FORK", None: "not reached"}[self.control_is_quiet]
        noticed = f"{self.noticed} of {self.clones} clones noticed, control: {control}"
        return f"{noticed}; {len(self.problems)} wrong" if self.problems else noticed


def short(value: object) -> str:
    """The first digits of something hexadecimal."""
    return str(value)[:_DIGITS]


def hook_results(results: list[str]) -> str:
    """How many hooks ended how."""
    counts = [(results.count(name), name) for name in ("ok", "skipped")]
    bad = len(results) - sum(count for count, _ in counts)
    words = [f"{count} {'skip' if name == 'skipped' else name}" for count, name in counts if count]
    return " ".join([*words, *([f"{bad} BAD"] if bad else [])]) or _NONE


def table(rows: list[Row]) -> list[str]:
    """The rows below their headings, each column as wide as it needs to be."""
    names = [one.name for one in fields(Row)]
    lines = [names, *([getattr(row, name) for name in names] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(names))]
    return ["  ".join(word.ljust(width) for word, width in zip(line, widths, strict=True)).rstrip() for line in lines]
