# SPDX-License-Identifier: Apache-2.0
"""How long things took, guest by guest: collected while the matrix runs, printed at its end, kept as a file.

Under emulation the figures are ten to fifty times those of real hardware. They are for comparing one run of the suite
with another on the same machine.
"""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One fork: times in milliseconds, None where they are not known."""

    guest: str
    edges: str
    record_to_page_ms: float | None
    page_to_first_hook_ms: float | None
    reaction_ms: float | None


def sample(guest: str, event: dict[str, Any], trace: list[tuple[str, int, str, float]]) -> Sample:
    """The times of one event; `trace` is what the first and the last hook noted, in steps of 10 ms."""
    token, detected = event["token"], event["boottime_ns"] / 1e6
    times = [now * 1000 - detected for _, _, of, now in trace if of == token]
    latency = event["detect_latency_us"]
    return Sample(
        guest=guest,
        edges="+".join(event["edges"]),
        record_to_page_ms=None if latency is None else latency / 1000,
        page_to_first_hook_ms=max(0.0, times[0]) if times else None,
        reaction_ms=max(0.0, times[-1]) if len(times) > 1 else None,
    )


class LatencyTable:
    """All samples of a run."""

    def __init__(self) -> None:
        self.samples: list[Sample] = []

    def add(self, one: Sample) -> None:
        """Keep a sample."""
        self.samples.append(one)

    def lines(self) -> list[str]:
        """The table: a row for each guest and set of edges, each figure as median and worst."""
        rows = [("guest", "edges", "forks", "record to page", "page to first hook", "whole reaction")]
        groups = sorted({(one.guest, one.edges) for one in self.samples})
        for guest, edges in groups:
            group = [one for one in self.samples if (one.guest, one.edges) == (guest, edges)]
            figures = (
                _figure([one.record_to_page_ms for one in group]),
                _figure([one.page_to_first_hook_ms for one in group]),
                _figure([one.reaction_ms for one in group]),
            )
            rows.append((guest, edges, str(len(group)), *figures))
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        return ["  ".join(word.ljust(width) for word, width in zip(row, widths, strict=True)).rstrip() for row in rows]

    def keep(self, directory: Path) -> None:
        """Write the table for people and the samples for programs."""
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "latency.txt").write_text("\n".join(self.lines()) + "\n")
        (directory / "latency.json").write_text(json.dumps([asdict(one) for one in self.samples], indent=1) + "\n")


def _figure(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    return f"{statistics.median(known):.1f} ms (max {max(known):.1f})"
