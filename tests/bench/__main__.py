# SPDX-License-Identifier: Apache-2.0
"""`python -m bench`: measure, keep the raw values, write the table, the plots and docs/performance.md.

A chapter that was not asked for keeps the values of its last run, and the machine and the date of that. The document is
written when every chapter has values that may be quoted; a quick run has a place of its own for what it finds.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

from bench import calls, clones, crowd, edge, fleet, footprint, growth, guest, machine, peers, reaction, report, steps
from bench.place import TOP
from bench.samples import Chapter, kept

# Full and quick runs of each chapter.
CHAPTERS: dict[str, tuple[Callable[[], Chapter], Callable[[], Chapter]]] = {
    "edge": (lambda: edge.measure(300), lambda: edge.measure(30)),
    "steps": (lambda: steps.measure(100), lambda: steps.measure(15)),
    "reaction": (lambda: reaction.measure(30), lambda: reaction.measure(6)),
    "footprint": (
        lambda: footprint.measure(idle_sec=180, starts=20),
        lambda: footprint.measure(idle_sec=6, starts=5),
    ),
    "calls": (lambda: calls.measure(30), lambda: calls.measure(6)),
    "crowd": (lambda: crowd.measure(rounds=15, forks=1000), lambda: crowd.measure(rounds=4, forks=100)),
    "peers": (lambda: peers.measure(15), lambda: peers.measure(3, idle_sec=2)),
    "growth": (lambda: growth.measure(7), lambda: growth.measure(3)),
    "fleet": (lambda: fleet.measure(10_000), lambda: fleet.measure(1000)),
    "clones": (lambda: clones.measure(6, spread_sec=120), lambda: clones.measure(3, spread_sec=30)),
    "guest": (lambda: guest.measure(3), lambda: guest.measure(1)),
}


def main() -> int:
    options = _options()
    options.out.mkdir(parents=True, exist_ok=True)
    where = machine.describe()
    for name in options.only:
        print(f"bench: {name}", file=sys.stderr)
        chapter = CHAPTERS[name][options.quick]()
        chapter.machine = where
        (options.out / f"{name}.json").write_text(json.dumps(chapter.to_json(), indent=1) + "\n")
        print(report.table([chapter]), flush=True)
    chapters = list(kept(options.out / f"{name}.json" for name in CHAPTERS))
    drawn = report.plots(chapters, options.out)
    if not drawn:
        print("bench: no plots: matplotlib is not installed", file=sys.stderr)
    _document(chapters, next((path for path in drawn if path.suffix == ".svg"), None), options)
    missed = [one for chapter in chapters for one in chapter.series if one.kept is False]
    for one in missed:
        print(f"bench: missed: {one.what}: {report.number(one.judged)} {one.unit}", file=sys.stderr)
    return 0


def _options() -> argparse.Namespace:
    """The command line; `docs` is None where nothing is to be written there."""
    parser = argparse.ArgumentParser(prog="python -m bench", description="Measures vmfork beside its likes.")
    parser.add_argument("--only", metavar="CHAPTER,...", default="", help=f"of {', '.join(CHAPTERS)}")
    parser.add_argument("--quick", action="store_true", help="few samples: to try the bench, not to quote")
    parser.add_argument("--out", type=Path, metavar="DIR", help="for raw values, plots (default: in artifacts/)")
    parser.add_argument(
        "--docs",
        type=Path,
        metavar="DIR",
        help="for performance.md (default: docs/ where all chapters were measured in full, else nowhere)",
    )
    options = parser.parse_args()
    options.only = [name for name in options.only.split(",") if name] or list(CHAPTERS)
    unknown = set(options.only) - CHAPTERS.keys()
    if unknown:
        parser.error(f"no such chapter: {', '.join(sorted(unknown))}")
    options.out = options.out or TOP / ("artifacts/bench-quick" if options.quick else "artifacts/bench")
    return options


def _document(chapters: list[Chapter], svg: Path | None, options: argparse.Namespace) -> None:
    missing = CHAPTERS.keys() - {chapter.name for chapter in chapters}
    if options.docs is None and (options.quick or missing):
        why = "a quick run is not to be quoted" if options.quick else f"not measured yet: {', '.join(sorted(missing))}"
        print(f"bench: docs/performance.md stays as it is: {why}", file=sys.stderr)
        return
    docs: Path = options.docs or TOP / "docs"
    docs.mkdir(parents=True, exist_ok=True)
    if svg is not None:
        (docs / svg.name).write_text(svg.read_text())
    (docs / "performance.md").write_text(report.markdown(chapters, plot=svg.name if svg is not None else None))


if __name__ == "__main__":
    sys.exit(main())
