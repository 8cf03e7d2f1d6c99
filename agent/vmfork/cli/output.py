# SPDX-License-Identifier: Apache-2.0
"""How vmforkctl prints: JSON as asked for, else tables of at most 80 columns; colour on a terminal without NO_COLOR."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import sys
import textwrap
from collections.abc import Iterable, Sequence

from vmfork.jsonfields import JsonObject, JsonValue

GREEN, YELLOW, RED, BOLD, GREY = "32", "33", "31", "1", "90"

_WIDTH = 80
# Wrapping cells to less would only make the table longer.
_NARROWEST = 8


def wants_json(options: argparse.Namespace) -> bool:
    """True where the value itself is to be printed."""
    return str(options.json) != "off"


def print_json(options: argparse.Namespace, value: JsonValue | Sequence[JsonObject]) -> None:
    """Print one value: pretty, or on one line where that was asked for or nobody looks."""
    pretty = options.json == "pretty" or (options.json == "auto" and sys.stdout.isatty())
    if pretty:
        print(json.dumps(value, indent=2))
    else:
        print(json.dumps(value, separators=(",", ":")))


def colour(text: str, code: str) -> str:
    """The text in a colour, where that is of use."""
    if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb" or not sys.stdout.isatty():
        return text
    return f"\x1b[{code}m{text}\x1b[0m"


def width() -> int:
    """Columns to use: those of the terminal, at least 80 where there is none."""
    return max(40, shutil.get_terminal_size((_WIDTH, 24)).columns)


def printable(text: str) -> str:
    """The text with what could steer a terminal spelled out: names of files and of processes are anybody's choice."""
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)


def wrapped(text: str, columns: int) -> list[str]:
    """Lines of at most so many columns; names with hyphens in them stay whole where they can."""
    return textwrap.wrap(printable(text), columns, break_on_hyphens=False) or [""]


def print_table(
    headings: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    legend: bool,
    tones: Sequence[str | None] = (),
    notes: Sequence[Sequence[str]] = (),
) -> None:
    """Columns as wide as they need, the widest ones wrapped until the line is narrow enough.

    For each row, `tones` may give its last column a colour, and `notes` are lines of their own below it.
    """
    lines = [tuple(map(printable, row)) for row in rows]
    shown = [tuple(headings), *lines] if legend else lines
    if not shown:
        return
    widths = _column_widths(shown)
    if legend:
        print(colour(_joined(headings, widths), BOLD))
    for number, row in enumerate(lines):
        tone = tones[number] if tones else None
        pieces = [wrapped(cell, size) for cell, size in zip(row, widths, strict=True)]
        for cells in itertools.zip_longest(*pieces, fillvalue=""):
            print(_joined(cells, widths, tone))
        for note in notes[number] if notes else ():
            for piece in wrapped(note, width() - 6):
                print(f"      {colour(piece, tone) if tone else piece}")


def _column_widths(rows: Sequence[Sequence[str]]) -> list[int]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    room = width() - 2 * (len(widths) - 1)
    while sum(widths) > room and max(widths) > _NARROWEST:
        widths[widths.index(max(widths))] -= 1
    return widths


def _joined(cells: Sequence[str], widths: Sequence[int], tone: str | None = None) -> str:
    start = "".join(f"{cell:<{size}}  " for cell, size in zip(cells[:-1], widths, strict=False))
    last = cells[-1]
    return f"{start}{colour(last, tone)}" if tone and last else f"{start}{last}".rstrip()


def print_fields(fields: Iterable[tuple[str, str] | tuple[str, str, str]]) -> None:
    """One `name: value` a line, names flush right as systemctl does; long values are wrapped. A third item is the
    colour of the value."""
    for name, value, *tone in fields:
        for number, piece in enumerate(wrapped(value, width() - 18)):
            label = f"{name}:" if number == 0 else ""
            print(f"{label:>16} {colour(piece, tone[0]) if tone else piece}")


def print_list(lines: Iterable[str]) -> None:
    """One item after the other, each with a dash."""
    for line in lines:
        first, *rest = wrapped(line, width() - 4)
        print(f"  - {first}")
        for piece in rest:
            print(f"    {piece}")


def remark(options: argparse.Namespace, text: str) -> None:
    """Something a person may want to know, on stderr, unless -q."""
    if not options.quiet:
        print(text, file=sys.stderr)
