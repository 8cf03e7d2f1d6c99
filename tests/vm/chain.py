# SPDX-License-Identifier: Apache-2.0
"""`make chain`: one guest saved and restored many times over, each time from the state that the last restore left.

Every link gets another generation ID. After each fork the detector's memory, descriptors and threads and the size of
what it keeps on disk are noted; all of them are written to artifacts/chain.json, with a picture beside it. Exits with 1
where a fork was not noticed once and rightly, or where something grows with the number of forks.
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import shutil
import statistics
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lab import host, view
from lab.clones import ready
from lab.guest import Guest, Saved
from lab.guests import Guests
from lab.host import LabError
from lab.payload import payload
from lab.workspace import workspace

_TOP = Path(__file__).resolve().parents[2]
ARTIFACTS = _TOP / "artifacts"
_HOOKS = _TOP / "hooks.d"
# The history keeps 1000 events, so that it grows in any chain that a person would wait for: a bound for each of them.
_HISTORY_BYTES_PER_FORK = 8192
_STATE_BYTES = 4096
_RSS_GROWTH_KIB = 1024
_SETTLING = 10  # links before a figure is compared with later ones
_LEAST = 3  # links that are compared with as many

# The detector is what is looked at. Under emulation a reaction takes seconds, so of the shipped hooks one is left.
_ONE_HOOK = "".join(
    f"[Hook {hook.stem}]\nEnable=no\n" for hook in sorted(_HOOKS.iterdir()) if hook.stem not in ("10-rng", "README")
)

_FOOTPRINT = """
for directory in /proc/[0-9]*; do
    tr '\\0' ' ' <$directory/cmdline 2>/dev/null | grep -q 'vmfork[.]daemon' || continue
    awk '/^VmRSS|^Threads/ { print $2 }' $directory/status
    ls $directory/fd | wc -l
    stat -c %s /var/lib/vmfork/state.json /var/lib/vmfork/history.jsonl
    exit
done
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """One restore: what the detector held after it, and how long it took. Sizes in bytes unless the name says KiB."""

    generation: int
    rss_kib: int
    threads: int
    descriptors: int
    state: int
    history: int
    latency_us: int | None
    seconds: float


def growth(links: Sequence[Link]) -> Iterator[str]:
    """What the last third of the links after the settling holds more than the first; what is too large on disk.

    Medians of parts that have no link in common: a connection that happens to be open when a link is looked at is no
    growth.
    """
    part = (len(links) - _SETTLING) // 3
    if part < _LEAST:
        return
    early, late = links[_SETTLING : _SETTLING + part], links[-part:]
    for name, allowed in (("rss_kib", _RSS_GROWTH_KIB), ("threads", 0), ("descriptors", 0)):
        before, after = (statistics.median_high(getattr(link, name) for link in some) for some in (early, late))
        if after - before > allowed:
            yield f"{name} grew from {before} to {after}"
    if links[-1].state > _STATE_BYTES:
        yield f"state.json has {links[-1].state} bytes"
    if links[-1].history > _HISTORY_BYTES_PER_FORK * len(links):
        yield f"history.jsonl has {links[-1].history} bytes after {len(links)} forks"


class Chain:
    """Goes from one saved state to the next; `problems` are the promises that did not hold."""

    def __init__(self, first: Saved) -> None:
        self._saved = first
        self.links: list[Link] = []
        self.problems: list[str] = []

    def restore(self) -> None:
        """One more link."""
        generation = len(self.links) + 2
        started = time.monotonic()
        guest = self._saved.restore(f"link-{generation}", guid=uuid.uuid4())
        try:
            event = view.wait_event(guest, after=generation - 1)
            self._judge(guest, event, generation)
            figures = [int(word) for word in guest.check("sh", "-c", _FOOTPRINT).split()]
            rss, threads, descriptors, state, history = figures
            # Without this each link would live in a directory below that of the link before.
            self._saved, before = replace(guest.save(), directory=self._saved.directory), self._saved
            shutil.rmtree(before.memory.parent, ignore_errors=True)
        finally:
            guest.kill()
        self.links.append(
            Link(
                generation=generation,
                rss_kib=rss,
                threads=threads,
                descriptors=descriptors,
                state=state,
                history=history,
                latency_us=event["detect_latency_us"],
                seconds=time.monotonic() - started,
            )
        )

    def _judge(self, guest: Guest, event: view.Event, generation: int) -> None:
        expected = guest.generation_id
        assert expected is not None
        wrong = []
        if (event["generation"], event["kind"], event["state"]) != (generation, "live", "settled"):
            wrong.append(f"{event['kind']} fork, generation {event['generation']}, {event['state']}")
        if event["generation_id"] != expected.hex():
            wrong.append("another generation ID than the hypervisor gave")
        wrong += [one for one in view.failed_hooks(event) if not one.endswith(": masked")]
        self.problems += [f"link {generation}: {sentence}" for sentence in wrong]

    def judge_growth(self) -> None:
        """Add what has grown to the problems."""
        self.problems += growth(self.links)

    def summary(self) -> str:
        """A line for each figure: first, median, last."""
        lines = [f"{len(self.links)} restores in a chain, {len(self.problems)} problems"]
        for name in ("rss_kib", "threads", "descriptors", "state", "history", "latency_us", "seconds"):
            values = [value for link in self.links if (value := getattr(link, name)) is not None]
            if values:
                middle = statistics.median(values)
                lines.append(f"  {name:12} first {values[0]:8.6g}  median {middle:8.6g}  last {values[-1]:8.6g}")
        return "\n".join(lines)


def draw(links: list[Link], path: Path) -> None:
    """The figures over the generation, as a picture; nothing where matplotlib is not installed."""
    try:
        matplotlib: Any = importlib.import_module("matplotlib")
    except ImportError:
        return
    matplotlib.use("Agg")
    pyplot: Any = importlib.import_module("matplotlib.pyplot")
    figure, axes = pyplot.subplots(2, 2, figsize=(11, 7))
    generations = [link.generation for link in links]
    for axis, names, unit in (
        (axes[0][0], ("rss_kib",), "KiB"),
        (axes[0][1], ("threads", "descriptors"), "count"),
        (axes[1][0], ("state", "history"), "bytes"),
        (axes[1][1], ("latency_us",), "microseconds from the kernel's record to the page (emulated)"),
    ):
        for name in names:
            axis.plot(generations, [getattr(link, name) for link in links], label=name, linewidth=0.8)
        axis.set_ylabel(unit, fontsize=8)
        axis.set_ylim(bottom=0)
        axis.set_xlabel("generation")
        axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> int:
    parser = argparse.ArgumentParser(description="Restore a guest again and again from its last saved state.")
    parser.add_argument("--restores", type=int, default=500)
    options = parser.parse_args()
    missing = host.missing()
    if missing:
        print(f"chain: {missing}", file=sys.stderr)
        return 1
    logging.getLogger("lab").setLevel(logging.WARNING)
    with workspace() as directory:
        guest = ready(Guest(Guests(payload()).backports(), "first", directory, guid=uuid.uuid4()), probe=False)
        view.put(guest, "/etc/vmfork/vmfork.conf.d/chain.conf", _ONE_HOOK)
        guest.check("vmforkctl", "reload")
        chain = Chain(replace(guest.save(), directory=directory))
        started = time.monotonic()
        try:
            for number in range(1, options.restores + 1):
                chain.restore()
                if number % 10 == 0:
                    print(f"{time.monotonic() - started:6.0f} s  {number} restores", file=sys.stderr, flush=True)
        except LabError as error:
            chain.problems.append(f"link {len(chain.links) + 2}: {error}")
        chain.judge_growth()
    ARTIFACTS.mkdir(exist_ok=True)
    (ARTIFACTS / "chain.json").write_text(json.dumps([asdict(link) for link in chain.links], indent=1) + "\n")
    draw(chain.links, ARTIFACTS / "chain.png")
    print("\n".join([chain.summary(), *chain.problems]))
    return 1 if chain.problems else 0


if __name__ == "__main__":
    sys.exit(main())
