# SPDX-License-Identifier: Apache-2.0
"""From the raw values to a table on the terminal, docs/performance.md and the plots; nothing here measures."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bench.samples import Chapter, Curve, Series

_TITLES = {
    "edge": "From the edge to the page",
    "steps": "The steps from the edge to the page",
    "reaction": "From the edge to the hooks",
    "footprint": "The idle detector",
    "calls": "What programs and people call",
    "crowd": "Crowds",
    "peers": "Peers, on the same work",
    "growth": "Growth",
    "fleet": "A fleet of clones",
    "clones": "A few real clones and their DHCP server (emulated)",
    "guest": "In a forked guest (emulated)",
}

_HEAD = """<!-- Written by `make bench`; change tests/bench, not this file. -->
# Performance

How fast vmfork is and what it costs, measured beside a minimal C program, beside bare Python and beside other programs
that run scripts when something happens. One command measures everything anew and writes this file:

```sh
make bench             # all of it, tens of minutes on an idle machine; as root for the rows that need more
make bench ONLY=edge   # one chapter; the others keep their last values, with their machine and date
```

Figures are medians, then the quartiles as their spread; n is the number of samples. Rows in italics are what vmfork is
compared with. What is compared within a chapter is taken in turns, so that a busy moment of the machine hits all alike;
where it is not, the chapter says so. The raw values are in `artifacts/bench/`.
"""
# Where something was measured, but not on what.
_OCCASION = ("date", "load")


def number(value: float) -> str:
    """Three digits that mean something."""
    if value == 0:
        return "0"
    if abs(value) >= 100:
        return f"{value:.0f}"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:.{min(digits, 3)}f}"


def verdict(one: Series) -> str:
    if one.budget is None:
        return ""
    limit = f"{'p99 ' if one.budget_of == 'p99' else ''}≤ {number(one.budget)} {one.unit}".strip()
    return f"{limit}: {'kept' if one.kept else '**missed**'}"


def rows(chapter: Chapter) -> Iterable[tuple[str, str, str, str, str]]:
    for one in chapter.series:
        shown = one.percentile(99) if one.budget_of == "p99" else one.median
        low, high = one.quartiles
        # The quartiles of all values say nothing of how sure their 99th percentile is.
        spread = f"{number(low)} to {number(high)}" if len(one.values) > 1 and one.budget_of == "median" else ""
        yield one.what, f"{number(shown)} {one.unit}".strip(), spread, str(len(one.values)), verdict(one)


def table(chapters: Iterable[Chapter]) -> str:
    """For the terminal."""
    lines = []
    for chapter in chapters:
        lines.append(_TITLES.get(chapter.name, chapter.name))
        lines += [
            f"  {what:<66} {value:>12}  {spread:<20} {budget.replace('**', '')}"
            for what, value, spread, _, budget in rows(chapter)
        ]
        lines += [f"  {curve.what}: {_shape(curve)}" for curve in chapter.curves]
        lines += [f"  {remark}" for remark in chapter.remarks]
    return "\n".join(lines)


def _shape(curve: Curve) -> str:
    steps = ", ".join(
        f"{size:g}: {number(cost)}" + (f" ({number(low)} to {number(high)})" if high > low else "")
        for (size, cost), (low, high) in zip(curve.points, curve.spread, strict=True)
    )
    growth = (
        "no growth beyond the spread"
        if curve.bend is None
        else f"one more costs {number(curve.bend)} times as much in the last step"
    )
    return f"{steps} {curve.unit}; {growth}"


def markdown(chapters: list[Chapter], *, plot: str | None) -> str:
    """docs/performance.md: first what the machines of all chapters have in common, with each chapter its own."""
    first, *others = [chapter.machine for chapter in chapters]
    common = {
        key: value
        for key, value in first.items()
        if key not in _OCCASION and all(other.get(key) == value for other in others)
    }
    parts = [_HEAD, "## Measured on\n"]
    parts.append("\n".join(f"- {key}: {value}" for key, value in common.items()) + "\n")
    if plot is not None:
        parts.append(f"![Measured values beside their budgets and beside the others]({plot})\n")
    for chapter in chapters:
        parts.append(f"## {_TITLES.get(chapter.name, chapter.name)}\n")
        parts.append(_occasion(chapter.machine, common))
        if chapter.series:
            parts.append(_table_of(chapter))
        for curve in chapter.curves:
            parts.append(f"- {curve.what}, by {curve.over}: {_shape(curve)}.")
        if chapter.curves:
            parts.append("")
        parts += [f"{remark}\n" for remark in chapter.remarks]
        notes = [f"- {one.what}: {one.note}." for one in chapter.series if one.note]
        if notes:
            parts.append("\n".join(notes) + "\n")
    return "\n".join(parts).rstrip() + "\n"


def _occasion(machine: dict[str, str], common: dict[str, str]) -> str:
    own = [f"{key} {value}" for key, value in machine.items() if key not in common and key not in _OCCASION]
    return f"Measured {'; '.join([machine['date'], 'load ' + machine['load'], *own])}.\n"


def _table_of(chapter: Chapter) -> str:
    lines = ["| what | median | quartiles | n | budget |", "|---|---:|---|---:|---|"]
    for one, (what, value, spread, count, budget) in zip(chapter.series, rows(chapter), strict=True):
        lines.append(f"| {f'*{what}*' if one.peer else what} | {value} | {spread} | {count} | {budget} |")
    return "\n".join(lines) + "\n"


def plots(chapters: list[Chapter], directory: Path) -> list[Path]:
    """performance.png and performance.svg: distributions beside the reference, budgets used, curves of growth."""
    try:
        matplotlib: Any = importlib.import_module("matplotlib")
    except ImportError:
        return []
    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "vmfork", "font.size": 9})
    pyplot: Any = importlib.import_module("matplotlib.pyplot")
    figure, axes = pyplot.subplots(2, 2, figsize=(15, 10))
    by_name = {chapter.name: chapter for chapter in chapters}
    _latencies(axes[0][0], by_name.get("edge"))
    _budgets(axes[0][1], chapters)
    _events(axes[1][0], by_name.get("peers"))
    _growth(axes[1][1], by_name.get("growth"))
    figure.tight_layout(w_pad=3)
    written = []
    for suffix in ("png", "svg"):
        path = directory / f"performance.{suffix}"
        figure.savefig(path, dpi=110, metadata={"Date": None} if suffix == "svg" else None)
        written.append(path)
    pyplot.close(figure)
    svg = directory / "performance.svg"
    svg.write_text("\n".join(line.rstrip() for line in svg.read_text().splitlines()) + "\n")
    return written


def _latencies(axis: Any, chapter: Chapter | None) -> None:
    axis.set_title("Edge to page: cumulative share of samples")
    if chapter is None:
        return
    for one in chapter.series:
        if one.unit == "us" and one.budget_of == "median":
            ordered = sorted(one.values)
            shares = [(index + 1) / len(ordered) for index in range(len(ordered))]
            axis.step(ordered, shares, where="post", label=one.what)
    axis.axvline(300, color="grey", linestyle=":", label="budget of the median")
    axis.set_xscale("log")
    axis.set_xlabel("microseconds")
    axis.legend(loc="lower right", fontsize=7)


def _budgets(axis: Any, chapters: list[Chapter]) -> None:
    axis.set_title("Share of the budget that is used")
    judged = [one for chapter in chapters for one in chapter.series if one.budget]
    shares = [one.judged / (one.budget or 1) for one in judged]
    colours = ["tab:green" if share <= 1 else "tab:red" for share in shares]
    places = range(len(judged))
    axis.barh(places, [min(max(share, 0), 4) for share in shares], color=colours)
    axis.set_yticks(places, [one.what for one in judged], fontsize=6)
    axis.invert_yaxis()
    axis.axvline(1, color="grey", linestyle=":")


def _events(axis: Any, chapter: Chapter | None) -> None:
    axis.set_title("Event to the last of N scripts")
    if chapter is None:
        return
    for curve in chapter.curves:
        sizes, costs = zip(*curve.points, strict=True)
        (line,) = axis.plot(sizes, costs, marker="o", label=curve.what)
        axis.fill_between(sizes, *zip(*curve.spread, strict=True), color=line.get_color(), alpha=0.2)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("scripts")
    axis.set_ylabel("milliseconds")
    axis.legend(loc="lower right", fontsize=7)


def _growth(axis: Any, chapter: Chapter | None) -> None:
    axis.set_title("Growth: cost over that of the smallest size")
    if chapter is None:
        return
    for curve in chapter.curves:
        (_, base), *_ = curve.points
        sizes, costs = zip(*curve.points, strict=True)
        axis.plot(sizes, [cost / base for cost in costs], marker="o", label=f"{curve.what}, by {curve.over}")
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.legend(loc="upper left", fontsize=7)
