# SPDX-License-Identifier: Apache-2.0
"""Clones of one guest that resume in the same moment on one switch with one DHCP server, with SpreadSec= and without.

What the fleet's model says of thousands, shown on a few: QEMU guests, the shipped hooks, systemd-networkd, dnsmasq. All
is measured where the server is, by the switch: when each clone first asked, and how many messages came together.
"""

from __future__ import annotations

import os
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

from lab import host, lan, view
from lab.clones import Clones, ready
from lab.deadline import until
from lab.guest import Guest, Saved
from lab.guests import Guests
from lab.payload import payload
from lab.switch import MAC, Switch, missing, switch
from lab.workspace import workspace

from bench.samples import Chapter, Series
from vmfork.actions.spread import share

_HOOKS = ("20-machine-id", "35-mac-address", "40-leases")
# A clone alone sends three messages within a second, so that with a few clones chance decides what a second holds.
_NEAR_SEC = 10.0
# Emulated guests that share two processors need minutes for what a machine does in seconds.
_PATIENCE_SEC = 300
# A new machine ID has journald restarted, too: half of all the work, and nothing that a server sees.
_CONFIGURATION = """[React]
Template=yes
TimeoutSec=180
SpreadSec={spread:g}

[Hook 20-machine-id]
RestartUnits=systemd-networkd.service

[Hook 35-mac-address]
Interfaces=eth0

[Hook 40-leases]
WaitSec=60
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Clone:
    """One clone after its reaction; `asked` are its messages to the server, in seconds after the resume."""

    token: bytes
    settled: bool
    address: str
    asked: tuple[float, ...]


def measure(clones: int, *, spread_sec: float) -> Chapter:
    chapter = Chapter(name="clones")
    reason = host.missing() or missing()
    if reason:
        chapter.remarks.append(f"Not measured: {reason}.")
        return chapter
    with workspace() as directory, switch(directory / "lan") as wire:
        saved, was = _saved(wire, directory, (0.0, spread_sec))
        for window, moment in saved.items():
            chapter.series += _rows(_resumed(wire, moment, clones), window, was)
    chapter.remarks += [
        f"{clones} clones of one guest under systemd-networkd, each with a new VM Generation ID, are resumed in one"
        " moment. Each gives itself a new machine ID, a new MAC address and so a new client identifier, and asks one"
        " dnsmasq for another address. The switch between them notes every message to the server on the host's clock."
        " A clone asks several times: for the address that it had, which the server refuses to the new identifier; for"
        " any other; for that one again under the new MAC address; and a last time to verify it.",
        f"These guests are emulated, {clones} of them on {os.cpu_count()} processors, which alone make them late and"
        " keep them apart: the rows for SpreadSec=0 show by how much, and a turn that comes sooner is not seen."
        " Real clones react within a second, so that without SpreadSec= they would ask closer together than here.",
        _of_the_window(chapter, spread_sec),
        f"A clone alone sends up to three messages within a second, so that chance decides how many of {clones} clones'"
        f" messages one second holds; hence the rows for {_NEAR_SEC:g} seconds.",
    ]
    return chapter


def _of_the_window(chapter: Chapter, spread_sec: float) -> str:
    """What SpreadSec= has changed for the server, by the values."""
    without, spread = (
        {key: chapter[f"{key}-{window:g}"].median for key in ("apart", "near", "crowd")} for window in (0.0, spread_sec)
    )
    return (
        f"With SpreadSec={spread_sec:g} the clones began within {spread['apart']:.1f} s instead of"
        f" {without['apart']:.1f} s. Within {_NEAR_SEC:g} s at most {spread['near']:.0f} of them began instead of"
        f" {without['near']:.0f}, and the server had at most {spread['crowd']:.0f} messages to answer instead of"
        f" {without['crowd']:.0f}."
    )


def _saved(wire: Switch, directory: Path, windows: Sequence[float]) -> tuple[dict[float, Saved], str]:
    """One booted guest with a lease, saved once for each window; and its address."""
    spec = wire.connected(Guests(payload()).trixie())
    guest = ready(Guest(spec, "bench-clones", directory, guid=uuid.uuid4()), probe=False)
    try:
        lan.join(guest)
        lan.mask_all_but(guest, *_HOOKS)
        found = {}
        for window in windows:
            view.put(guest, "/etc/vmfork/vmfork.conf.d/50-bench.conf", _CONFIGURATION.format(spread=window))
            guest.check("vmforkctl", "reload")
            found[window] = guest.save(go_on=True)
        return found, lan.address(guest)
    finally:
        guest.kill()


@contextmanager
def _paused(saved: Saved, count: int) -> Iterator[list[Guest]]:
    held = Clones()
    try:
        names = (f"clone-{uuid.uuid4().hex[:8]}" for _ in range(count))
        yield [held.restore(saved, name, guid=uuid.uuid4(), paused=True) for name in names]
    finally:
        held.end(None)


def _resumed(wire: Switch, saved: Saved, count: int) -> list[Clone]:
    """Resume all clones at once, and wait until the reaction of each has ended."""
    with _paused(saved, count) as guests:
        before = _leased(wire)
        wire.forget()
        resumed = monotonic()
        for guest in guests:
            guest.resume()
        # The guests are asked only when there is little left that it could disturb.
        until(
            lambda: len(_leased(wire) - before) >= count,
            seconds=_PATIENCE_SEC,
            what="each clone has a lease",
            every=0.5,
        )
        events = [view.wait_event(guest, after=1, timeout=_PATIENCE_SEC) for guest in guests]
        seen = wire.seen()
        found = []
        for guest, event in zip(guests, events, strict=True):
            (port,) = seen.macs[guest.check("cat", "/sys/class/net/eth0/address").strip()]
            found.append(
                Clone(
                    token=bytes.fromhex(event["token"]),
                    settled=event["state"] == "settled",
                    address=lan.address(guest),
                    asked=tuple(message.at - resumed for message in seen.dhcp if message.port == port),
                )
            )
        return found


def _leased(wire: Switch) -> set[str]:
    """The MAC addresses that have leases, without the one that all clones begin with.

    dnsmasq rewrites the file in place: a line may be cut off.
    """
    lines = (line.split() for line in wire.leases.read_text().splitlines())
    return {words[1] for words in lines if len(words) > 3} - {MAC}


def most_within(times: Sequence[float], seconds: float) -> int:
    """The largest number of moments that lie in any window of this length."""
    return max(sum(first <= other < first + seconds for other in times) for first in times)


def _rows(clones: list[Clone], window: float, was: str) -> list[Series]:
    label = f"{len(clones)} clones, SpreadSec={window:g}"
    firsts = sorted(clone.asked[0] for clone in clones)
    every = [at for clone in clones for at in clone.asked]
    addresses = Counter([was, *(clone.address for clone in clones)])
    early = sum(clone.asked[0] < share(clone.token, window) for clone in clones)
    found = [
        Series(key="first", what=f"{label}: resume to a clone's first message", unit="s", values=firsts),
        Series(
            key="apart",
            what=f"{label}: from the first clone's to the last's",
            unit="s",
            values=[firsts[-1] - firsts[0]],
        ),
        Series(
            key="near",
            what=f"{label}: that began within {_NEAR_SEC:g} s, at most",
            unit="",
            values=[most_within(firsts, _NEAR_SEC)],
        ),
        Series(
            key="crowd",
            what=f"{label}: messages within {_NEAR_SEC:g} s, at most",
            unit="",
            values=[most_within(every, _NEAR_SEC)],
        ),
        Series(key="second", what=f"{label}: messages within 1 s, at most", unit="", values=[most_within(every, 1.0)]),
        Series(
            key="messages",
            what=f"{label}: messages of each clone",
            unit="",
            values=[float(len(clone.asked)) for clone in clones],
        ),
        Series(
            key="alike",
            what=f"{label}: that share an address, or failed",
            unit="",
            values=[float(sum(addresses[clone.address] > 1 or not clone.settled for clone in clones))],
            budget=0,
        ),
    ]
    if window > 0:
        late = [clone.asked[0] - share(clone.token, window) for clone in clones]
        found.append(
            Series(key="late", what=f"{label}: from its turn to a clone's first message", unit="s", values=late)
        )
        found.append(Series(key="early", what=f"{label}: before their turn", unit="", values=[float(early)], budget=0))
    for one in found:
        one.key += f"-{window:g}"
    return found
