# SPDX-License-Identifier: Apache-2.0
"""How vmforkctl prints: JSON as asked for, else tables of at most 80 columns; colour on a terminal without NO_COLOR."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import textwrap
from collections.abc import Iterable, Sequence

from vmfork.jsonfields import JsonObject, JsonValue

GREEN, YELLOW, RED, BOLD, GREY = "32", "33", "31", "1", "90"

_WIDTH = 80


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


def print_table(headings: Sequence[str], rows: Iterable[Sequence[str]], *, legend: bool) -> None:
    """Columns as wide as they need; the last one is wrapped below itself."""
    lines = [tuple(map(str, row)) for row in rows]
    shown = [tuple(headings), *lines] if legend else lines
    if not shown:
        return
    widths = [max(len(row[column]) for row in shown) for column in range(len(headings) - 1)]
    left = sum(widths) + 2 * len(widths)
    room = max(20, width() - left)
    for number, row in enumerate(shown):
        start = "".join(f"{cell:<{size}}  " for cell, size in zip(row, widths, strict=False))
        pieces = textwrap.wrap(row[-1], room) or [""]
        text = "\n".join([start + pieces[0], *(" " * left + piece for piece in pieces[1:])])
        print(colour(text.rstrip(), BOLD) if legend and number == 0 else text.rstrip())


def print_fields(fields: Iterable[tuple[str, str]]) -> None:
    """One `name: value` a line, names flush right as systemctl does; long values are wrapped."""
    for name, value in fields:
        pieces = textwrap.wrap(value, max(20, width() - 18)) or [""]
        print(f"{name:>15}: {pieces[0]}")
        for piece in pieces[1:]:
            print(f"{'':>17}{piece}")


def remark(options: argparse.Namespace, text: str) -> None:
    """Something a person may want to know, on stderr, unless -q."""
    if not options.quiet:
        print(text, file=sys.stderr)
