# SPDX-License-Identifier: Apache-2.0
"""Others that run scripts when something happens, and vmfork, on the same work.

They are udev, acpid, the QEMU guest agent, networkd-dispatcher and NetworkManager's dispatcher. An event arrives,
N scripts run; each is a copy of stamp.c, so what is timed is who starts it. All run in the same kind of copy-on-write
copy of this machine, on the same CPU, with the programs that Debian packages.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path

from bench.crowd import hook_times
from bench.footprint import memory_mib, wake_ups
from bench.peers_bus import networkd_dispatcher, nm_dispatcher
from bench.peers_daemons import acpid, qemu_ga, udev
from bench.peers_layer import Running, install
from bench.place import build, can_copy, real_daemon, scratch, until
from bench.reaction import stamps
from bench.samples import Chapter, Curve, Series

COUNTS = (1, 10, 100)

PEERS: dict[str, tuple[str, Callable[[Path, int], contextlib.AbstractContextManager[Running]]]] = {
    "udev": ("systemd-udevd, RUN rules", udev),
    "acpid": ("acpid", acpid),
    "qemu-ga": ("qemu-ga, fsfreeze hook", qemu_ga),
    "networkd-dispatcher": ("networkd-dispatcher", networkd_dispatcher),
    "nm-dispatcher": ("NetworkManager-dispatcher", nm_dispatcher),
}


def _one(running_peer: Running) -> tuple[float, float]:
    """Milliseconds from one event to the first and the last script."""
    for path in running_peer.scripts:
        Path(f"{path}.stamp").unlink(missing_ok=True)
    begin = running_peer.fire()
    for path in running_peer.scripts:
        until(lambda wanted=path: bool(stamps(wanted)), "script", seconds=20)  # type: ignore[misc]
    moments = [stamps(path)[0] for path in running_peer.scripts]
    return (min(moments) - begin) / 1e6, (max(moments) - begin) / 1e6


def measure(rounds: int) -> Chapter:
    chapter = Chapter(name="peers")
    reason = can_copy() or install()
    if reason is not None:
        chapter.remarks.append(f"No peer was measured: {reason}.")
        return chapter
    chapter.remarks.append(
        "vmforkd starts a fresh, unsandboxed Python process for each fork, the reactor: that is nearly all of its time"
        " to the first script, whatever their number. The others start scripts themselves, one after the other; vmfork"
        " runs those of equal order side by side."
    )
    chapter.remarks.append(
        "networkd-dispatcher and NetworkManager's dispatcher are told over a system bus of their own, which is on the"
        " way of the event, but not in their memory. To networkd-dispatcher, the event is the signal that the state of"
        " a link has changed, emitted by a program in the place of systemd-networkd; before the scripts, it runs"
        " networkctl to learn more about the link. To NetworkManager's dispatcher, the event is the call that"
        " NetworkManager makes when the host name has changed; its scripts are those that wait for each other, not"
        " those of no-wait.d. It was kept up with --persist: ordinarily, it is not there when idle, the bus starts it"
        " for an event, and it leaves ten seconds after the last."
    )
    with scratch() as name:
        program = build("stamp.c", Path(name) / "stamp", "-static")
        chapter.curves.append(_vmfork(chapter, rounds))
        for key, (title, start) in PEERS.items():
            try:
                chapter.curves.append(_peer(chapter, key, title, lambda n, s=start: s(program, n), rounds))  # type: ignore[misc]
            except (TimeoutError, OSError) as error:
                chapter.remarks.append(f"{title} did not work here: {error}.")
    return chapter


def _vmfork(chapter: Chapter, rounds: int) -> Curve:
    title = "vmfork, hooks of equal order"
    samples = []
    for count in COUNTS:
        times = hook_times(count, rounds)
        samples.append((float(count), times.lasts))
        if count == 1:
            chapter.series.append(
                Series(key="first-vmfork", what=f"{title}: event to first script", unit="ms", values=times.firsts)
            )
    with real_daemon(cpu=1) as daemon:
        _idle(chapter, "vmfork", "vmforkd", daemon.pid, peer=False)
    return Curve(key="last-vmfork", what=title, over="scripts", unit="ms", samples=samples)


def _peer(
    chapter: Chapter,
    key: str,
    title: str,
    start: Callable[[int], contextlib.AbstractContextManager[Running]],
    rounds: int,
) -> Curve:
    samples, started, note = [], [], ""
    for count in COUNTS:
        with start(count) as peer:
            started.append(peer.started_ms)
            note = peer.start_note
            found = [_one(peer) for _ in range(rounds)]
            samples.append((float(count), [last for _, last in found]))
            if count == 1:
                firsts = [first for first, _ in found]
                chapter.series.append(
                    Series(
                        key=f"first-{key}", what=f"{title}: event to first script", unit="ms", values=firsts, peer=True
                    )
                )
                _idle(chapter, key, title, peer.pid, peer=True)
    chapter.series.append(
        Series(
            key=f"start-{key}",
            what=f"{title}: start to listening",
            unit="ms",
            values=started,
            peer=True,
            note=note,
        )
    )
    return Curve(key=f"last-{key}", what=title, over="scripts", unit="ms", samples=samples)


def _idle(chapter: Chapter, key: str, title: str, pid: int, *, peer: bool) -> None:
    time.sleep(2)
    before = wake_ups(pid)
    time.sleep(10)
    woken = (wake_ups(pid) - before) * 6.0
    found = memory_mib(pid)
    for what, unit, value in (("RSS", "MiB", found["Rss"]), ("PSS", "MiB", found["Pss"]), ("wake-ups", "/min", woken)):
        chapter.series.append(
            Series(key=f"{what}-{key}", what=f"{title}: idle {what}", unit=unit, values=[value], peer=peer)
        )
