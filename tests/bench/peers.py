# SPDX-License-Identifier: Apache-2.0
"""Others that run scripts when something happens, and vmfork, on the same work.

They are udev, acpid, the QEMU guest agent, networkd-dispatcher and NetworkManager's dispatcher. An event arrives,
N scripts run; each is a copy of stamp.c, so what is timed is who starts it. All run side by side, each in a
copy-on-write copy of this machine, on the same CPU, with the programs that Debian packages; they are told in turns.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from bench.footprint import memory_mib, wake_ups
from bench.peers_bus import networkd_dispatcher, nm_dispatcher
from bench.peers_daemons import acpid, qemu_ga, udev, vmforkd
from bench.peers_layer import Running, install
from bench.place import build, can_copy, scratch, until
from bench.reaction import stamps
from bench.samples import Chapter, Curve, Series

COUNTS = (1, 10, 100)
_STARTS = 3

PEERS: dict[str, tuple[str, Callable[[Path, int], contextlib.AbstractContextManager[Running]]]] = {
    "vmfork": ("vmfork, hooks of equal order", vmforkd),
    "udev": ("systemd-udevd, RUN rules", udev),
    "acpid": ("acpid", acpid),
    "qemu-ga": ("qemu-ga, fsfreeze hook", qemu_ga),
    "networkd-dispatcher": ("networkd-dispatcher", networkd_dispatcher),
    "nm-dispatcher": ("NetworkManager-dispatcher", nm_dispatcher),
}

_REMARKS = (
    "All run at the same time, each in its own copy of this machine, and take turns: one event for each, round after"
    " round, then the next number of scripts. What is told of the idle is from before their first event; a neighbour"
    " that runs the same interpreter takes over a part of a PSS. A start includes making the namespaces and mounts of"
    " the copy, but for the two that are told over a bus, which enter those of the bus.",
    "vmforkd starts a fresh, unsandboxed Python process for each fork, the reactor: that is nearly all of its time"
    " to the first script, whatever their number. The others start scripts themselves, one after the other; vmfork"
    " runs those of equal order side by side, here on one CPU as the others.",
    "networkd-dispatcher and NetworkManager's dispatcher are told over a system bus of their own, which is on the"
    " way of the event, but not in their memory. To networkd-dispatcher, the event is the signal that the state of"
    " a link has changed, emitted by a program in the place of systemd-networkd; before the scripts, it runs"
    " networkctl to learn more about the link. To NetworkManager's dispatcher, the event is the call that"
    " NetworkManager makes when the host name has changed; its scripts are those that wait for each other, not"
    " those of no-wait.d. It was kept up with --persist: ordinarily, it is not there when idle, the bus starts it"
    " for an event, and it leaves ten seconds after the last.",
)


def _one(peer: Running) -> tuple[float, float]:
    """Milliseconds from one event to the first and the last script."""
    before = {path: len(stamps(path)) for path in peer.scripts}
    begin = peer.fire()
    for path, count in before.items():
        until(lambda path=path, count=count: len(stamps(path)) > count, "script", seconds=20)  # type: ignore[misc]
    moments = [stamps(path)[count] for path, count in before.items()]
    peer.rest()
    return (min(moments) - begin) / 1e6, (max(moments) - begin) / 1e6


class Field:
    """All who take part, and what was found of each; who fails is out, with a remark."""

    def __init__(self, chapter: Chapter, program: Path) -> None:
        self._chapter = chapter
        self._program = program
        self._in = dict(PEERS)
        self.found: dict[str, list[float]] = {}

    @contextlib.contextmanager
    def running(self, count: int) -> Iterator[dict[str, Running]]:
        """Each of them up, with so many scripts."""
        with contextlib.ExitStack() as stack:
            up = {}
            for key, (_, start) in list(self._in.items()):
                try:
                    up[key] = stack.enter_context(start(self._program, count))
                except (TimeoutError, OSError) as error:
                    self._leaves(key, error)
            for key, peer in up.items():
                self._note(f"start-{key}", peer.started_ms)
            yield up

    def idle(self, seconds: float) -> None:
        """What each is when it has nothing to do yet."""
        with self.running(1) as up:
            time.sleep(2)
            before = {key: wake_ups(peer.pid) for key, peer in up.items()}
            time.sleep(seconds)
            for key, peer in up.items():
                self._note(f"wake-ups-{key}", (wake_ups(peer.pid) - before[key]) * 60 / seconds)
                memory = memory_mib(peer.pid)
                self._note(f"RSS-{key}", memory["Rss"])
                self._note(f"PSS-{key}", memory["Pss"])

    def told(self, count: int, rounds: int) -> None:
        """So many events for each, in turns."""
        with self.running(count) as up:
            for _ in range(rounds):
                for key, peer in list(up.items()):
                    try:
                        first, last = _one(peer)
                    except (TimeoutError, OSError) as error:
                        self._leaves(key, error)
                        del up[key]
                        continue
                    self._note(f"first-{count}-{key}", first)
                    self._note(f"last-{count}-{key}", last)

    def _note(self, key: str, value: float) -> None:
        self.found.setdefault(key, []).append(value)

    def _leaves(self, key: str, error: Exception) -> None:
        title, _ = self._in.pop(key)
        self._chapter.remarks.append(f"{title} did not work here: {error}.")


_ROWS = (
    ("first-1", "event to first script", "ms"),
    ("RSS", "idle RSS", "MiB"),
    ("PSS", "idle PSS", "MiB"),
    ("wake-ups", "idle wake-ups", "/min"),
    ("start", "start to listening", "ms"),
)


def measure(rounds: int, idle_sec: float = 20) -> Chapter:
    chapter = Chapter(name="peers")
    reason = can_copy() or install()
    if reason is not None:
        chapter.remarks.append(f"No peer was measured: {reason}.")
        return chapter
    chapter.remarks += _REMARKS
    with scratch() as name:
        field = Field(chapter, build("stamp.c", Path(name) / "stamp", "-static"))
        for _ in range(_STARTS):
            field.idle(idle_sec)
        for count in COUNTS:
            field.told(count, rounds)
    for key, (title, _) in PEERS.items():
        for row, what, unit in _ROWS:
            if values := field.found.get(f"{row}-{key}"):
                one = Series(
                    key=f"{row}-{key}", what=f"{title}: {what}", unit=unit, values=values, peer=key != "vmfork"
                )
                chapter.series.append(one)
        lasts = [(float(count), field.found.get(f"last-{count}-{key}", [])) for count in COUNTS]
        if all(values for _, values in lasts):
            chapter.curves.append(Curve(key=f"last-{key}", what=title, over="scripts", unit="ms", samples=lasts))
    return chapter
