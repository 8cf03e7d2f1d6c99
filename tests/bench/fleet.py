# SPDX-License-Identifier: Apache-2.0
"""Thousands of clones that resume in the same second and ask the same three servers: a simulation.

The model: each clone comes to 40-leases after a time drawn from what was measured here, then asks a DHCP server (two
messages), a metadata server and a key registry. Each server has so many workers, a service time, and a bounded queue;
what finds the queue full, or is answered too late, is asked again after 1, 2, 4, ... s as DHCP clients and most
libraries do. With SpreadSec= each clone first waits its share, which its fork token decides.
"""

from __future__ import annotations

import heapq
import os
import random
import statistics
from collections import deque
from dataclasses import dataclass, field

from bench.reaction import one_hook, shipped
from bench.samples import Chapter, Series, percentile
from vmfork.actions.spread import share

_WINDOWS = (0.0, 10.0, 20.0, 30.0, 60.0)
_RESUME_SEC = 1.0
_TIME_OUT_SEC = 1.0
_LONGEST_PAUSE_SEC = 32.0


@dataclass(slots=True, kw_only=True)
class Server:
    """`workers` requests at a time, each for `service_sec`; `queue` more wait, the rest is dropped."""

    name: str
    workers: int
    service_sec: float
    queue: int
    busy: int = 0
    waiting: deque[tuple[int, int, int]] = field(default_factory=deque)
    deepest: int = 0
    asked: int = 0
    dropped: int = 0

    @property
    def capacity(self) -> float:
        return self.workers / self.service_sec


def servers() -> list[Server]:
    """Ordinary sizes: dnsmasq on a host, a metadata service, a registry that signs keys."""
    return [
        Server(name="DHCP server", workers=1, service_sec=0.0005, queue=250),
        Server(name="metadata server", workers=16, service_sec=0.004, queue=512),
        Server(name="key registry", workers=8, service_sec=0.010, queue=512),
    ]


@dataclass(slots=True, kw_only=True)
class Outcome:
    """When each clone had all its answers, in seconds after the first resume, and what the servers saw."""

    finished: list[float]
    servers: list[Server]

    @property
    def requests(self) -> int:
        return sum(server.asked for server in self.servers)


def simulate(clones: int, reaction_sec: list[float], *, spread_sec: float, seed: int) -> Outcome:
    """One run. Events are (time, number, what, clone, server, attempt); `what` is ask, done or late."""
    dice = random.Random(seed)
    # DHCP takes a DISCOVER and a REQUEST.
    found = servers()
    steps = [found[0], found[0], found[1], found[2]]
    events: list[tuple[float, int, str, int, int, int]] = []
    number = 0

    def later(when: float, what: str, clone: int, step: int, attempt: int) -> None:
        nonlocal number
        number += 1
        heapq.heappush(events, (when, number, what, clone, step, attempt))

    position = [0] * clones
    attempts = [0] * clones
    finished = [0.0] * clones
    for clone in range(clones):
        token = dice.randbytes(16)
        start = dice.random() * _RESUME_SEC + dice.choice(reaction_sec) + share(token, spread_sec)
        later(start, "ask", clone, 0, 0)
    while events:
        now, _, what, clone, step, attempt = heapq.heappop(events)
        server = steps[step]
        if what == "ask":
            if position[clone] != step or attempts[clone] != attempt:
                continue
            server.asked += 1
            if server.busy < server.workers:
                server.busy += 1
                later(now + server.service_sec, "done", clone, step, attempt)
            elif len(server.waiting) < server.queue:
                server.waiting.append((clone, step, attempt))
                server.deepest = max(server.deepest, len(server.waiting))
            else:
                server.dropped += 1
            # RFC 2131 and most libraries: again after 1, 2, 4, ... s, up to a second earlier or later.
            pause = min(_TIME_OUT_SEC * 2**attempt, _LONGEST_PAUSE_SEC) + dice.uniform(-0.5, 0.5)
            later(now + pause, "late", clone, step, attempt)
        elif what == "late":
            if position[clone] == step and attempts[clone] == attempt:
                attempts[clone] = attempt + 1
                later(now, "ask", clone, step, attempt + 1)
        else:
            if server.waiting:
                later(now + server.service_sec, "done", *server.waiting.popleft())
            else:
                server.busy -= 1
            # An answer to an attempt that was given up is thrown away by most clients: a new transaction runs.
            if position[clone] == step and attempts[clone] == attempt:
                position[clone], attempts[clone] = step + 1, 0
                if step + 1 == len(steps):
                    finished[clone] = now
                else:
                    later(now, "ask", clone, step + 1, 0)
    return Outcome(finished=finished, servers=found)


def _of_the_window(chapter: Chapter) -> str:
    """What the narrowest window in which nothing is dropped changes, by the values."""
    for window in _WINDOWS:
        if chapter[f"dropped-{window:g}"].median == 0:
            break
    if window == 0:
        return "With SpreadSec=0 these servers drop nothing from so many clones."
    (late, lost), (late_without, lost_without) = (
        (chapter[f"last-{one:g}"].median, chapter[f"dropped-{one:g}"].median) for one in (window, 0.0)
    )
    return (
        f"With SpreadSec={window:g} all are done after {late:.1f} s and {lost:.1f} % of the requests are dropped, with"
        f" SpreadSec=0 it is {late_without:.1f} s and {lost_without:.1f} %."
    )


def measure(clones: int) -> Chapter:
    chapter = Chapter(name="fleet")
    # A hook of the same number begins when 40-leases does, after all shipped hooks before it.
    turns, _ = one_hook(max(6, min(20, clones // 400)), "40-stamp", shipped)
    reaction = [value / 1000 for value in turns]
    slowest = min(server.capacity / (2 if server.name.startswith("DHCP") else 1) for server in servers())
    for spread in _WINDOWS:
        runs = [simulate(clones, reaction, spread_sec=spread, seed=seed) for seed in range(3)]
        label = f"{clones:,} clones, SpreadSec={spread:g}"
        series = (
            ("median", f"{label}: half of them done", "s", [percentile(run.finished, 50) for run in runs]),
            ("last", f"{label}: all of them done", "s", [max(run.finished) for run in runs]),
            ("requests", f"{label}: requests for each clone", "", [run.requests / clones for run in runs]),
            (
                "queue",
                f"{label}: longest queue of a server",
                "",
                [float(max(server.deepest for server in run.servers)) for run in runs],
            ),
            (
                "dropped",
                f"{label}: requests dropped",
                "%",
                [100 * sum(server.dropped for server in run.servers) / run.requests for run in runs],
            ),
        )
        for key, what, unit, values in series:
            chapter.series.append(Series(key=f"{key}-{spread:g}", what=what, unit=unit, values=values))
    tokens = [os.urandom(16) for _ in range(clones)]
    slots = [0] * 30
    for token in tokens:
        slots[int(share(token, 30.0))] += 1
    chapter.remarks += [
        "The model: "
        + "; ".join(
            f"{server.name}: {server.workers} at a time, {server.service_sec * 1000:g} ms each, {server.queue} may wait"
            for server in servers()
        )
        + f". From the edge to 40-leases it took {min(turns):.0f} to {max(turns):.0f} ms here, with the shipped hooks"
        f" below a root prefix. The slowest server serves {slowest:.0f} clones a second, so {clones:,} clones need"
        f" {clones / slowest:.1f} s however they ask.",
        _of_the_window(chapter),
        f"The shares of {clones:,} random tokens in 30 slots of one second: {min(slots)} to {max(slots)} clones,"
        f" {statistics.pstdev(slots) / statistics.mean(slots) * 100:.1f} % standard deviation.",
    ]
    return chapter
