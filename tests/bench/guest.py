# SPDX-License-Identifier: Apache-2.0
"""What only a forked guest shows: from the resume to the page, to the first hook and to settled; pages written.

Times are on the guest's own CLOCK_BOOTTIME, which stands still between the save and the resume. Its last reading before
the save is taken a moment too early, so that every figure is an upper bound. The guests are emulated: what takes a real
machine some ten to fifty milliseconds takes them a second, so these rows are to be compared with each other only.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lab import host, view
from lab.clones import ready
from lab.guest import Guest, Saved
from lab.guests import Guests
from lab.host import LabError
from lab.payload import payload
from lab.workspace import workspace

from bench import softdirty
from bench.samples import Chapter, Series

_NOW = "import time; print(time.clock_gettime_ns(time.CLOCK_BOOTTIME))"
_PAGES = "/run/vmfork-bench-pages"
# A program that waits for the end of the reaction, since before the snapshot: it has imported and connected by then.
_WAITER = "vmfork-bench-waiter"
_SEEN = "/run/vmfork-bench-settled"
_WAIT = """
import time, vmfork
vmfork.settled(after=1, timeout=0)
print("waits", flush=True)
try:
    vmfork.settled(after=1)
except vmfork.VmforkError as error:
    print("ended", error, flush=True)
else:
    print("settled", time.clock_gettime_ns(time.CLOCK_BOOTTIME), flush=True)
"""
# The same daemon with a garbage collector that may look at, and so write to, every object that was there before.
_UNFROZEN = """[Service]
ExecStart=
ExecStart=/usr/bin/python3 -I -c "import gc, runpy; gc.freeze = lambda: None; \
runpy.run_module('vmfork.daemon', run_name='__main__', alter_sys=True)"
"""


def measure(restores: int) -> Chapter:
    chapter = Chapter(name="guest")
    rss = Series(key="guest-rss", what="detector, idle, Debian 13's Python: RSS", unit="MiB", budget=18.0)
    missing = host.missing()
    if missing:
        chapter.remarks.append(f"Not measured: {missing}.")
        return chapter
    guests = Guests(payload())
    with workspace() as directory:
        for processors in (1, 2):
            with _booted(guests, directory, processors) as guest:
                rss.values.append(_rss_mib(guest))
                chapter.series += _times(guest, f"{processors} vCPU, idle", restores, go_on=True)
                if processors == 1:
                    chapter.series += _written(guest, restores)
                _load(guest, processors)
                chapter.series += _times(guest, f"{processors} vCPU, all of them busy", restores, go_on=False)
    chapter.series.append(rss)
    chapter.remarks += [
        "Settled is when a program that waits in vmfork.settled() since before the snapshot goes on.",
        of_freezing(chapter),
    ]
    return chapter


def of_freezing(chapter: Chapter) -> str:
    """What gc.freeze() is good for, by the pages that were counted."""
    found = []
    for key, when in (("idle", "as long as nothing happens"), ("fork", "when it is forked")):
        frozen, plain = chapter[f"written-{key}-frozen"], chapter[f"written-{key}-unfrozen"]
        (low, high), (plain_low, plain_high) = frozen.quartiles, plain.quartiles
        pages = plain.median - frozen.median
        if low <= plain_high and plain_low <= high:
            found.append(f"makes no difference {when} that could be told from the spread")
        else:
            verb = "spares" if pages > 0 else "costs"
            of_all = f" of {plain.median:.0f}" if plain.median else ""
            found.append(f"{verb} a clone {abs(pages):.0f}{of_all} pages {when}")
    return f"gc.freeze() {', and '.join(found)}."


@contextmanager
def _booted(guests: Guests, directory: Path, processors: int) -> Iterator[Guest]:
    guest = Guest(guests.trixie(processors=processors), f"bench-{processors}", directory, guid=uuid.uuid4())
    try:
        yield ready(guest, probe=False)
    finally:
        guest.kill()


def _rss_mib(guest: Guest) -> float:
    rollup = guest.check("cat", f"/proc/{view.main_pid(guest)}/smaps_rollup")
    return int(rollup.partition("\nRss:")[2].split()[0]) / 1024


def _load(guest: Guest, processors: int) -> None:
    guest.check("systemd-run", "stress-ng", f"--cpu={processors}", timeout=120)
    guest.until("sh", "-c", "test $(pgrep -c stress-ng) -ge 2", seconds=120, what="the load began")


def _let_wait(guest: Guest) -> None:
    guest.run("systemctl", "stop", f"{_WAITER}.service")
    output = f"--property=StandardOutput=truncate:{_SEEN}"
    guest.check("systemd-run", f"--unit={_WAITER}", "--collect", output, "/usr/bin/python3", "-c", _WAIT, timeout=120)
    guest.until("grep", "-q", "^waits", _SEEN, seconds=120, what="a program waits for the end of the reaction")


def _settled_at(clone: Guest) -> float:
    """CLOCK_BOOTTIME, ns, by the program that waited."""
    clone.until("grep", "-qE", "^(settled|ended)", _SEEN, seconds=300, what="the reaction has ended")
    verdict, _, rest = clone.check("tail", "-n1", _SEEN).strip().partition(" ")
    if verdict != "settled":
        raise LabError(f"{clone.name}: the reaction did not settle: {rest}")
    return float(rest)


def _times(guest: Guest, where: str, restores: int, *, go_on: bool) -> list[Series]:
    _let_wait(guest)
    read_at = int(guest.check("python3", "-c", _NOW))
    saved = guest.save(go_on=go_on)
    key = where.partition(",")[0][0] + where[-4:]
    found = [
        Series(key=f"{what}-{key}", what=f"resume to {name}, at most: {where}", unit="ms")
        for what, name in (("page", "the page"), ("hook", "the first hook"), ("settled", "settled"))
    ]
    for number in range(restores):
        with _clone(saved, f"{guest.name}-{key}-{number}", guid=uuid.uuid4()) as clone:
            event = view.wait_event(clone, after=1, timeout=300)
            marks = [now * 1e9 for _, _, token, now in view.hook_trace(clone) if token == event["token"]]
            for series, at in zip(found, (event["boottime_ns"], marks[0], _settled_at(clone)), strict=True):
                series.values.append((at - read_at) / 1e6)
    return found


@contextmanager
def _clone(saved: Saved, name: str, *, guid: uuid.UUID | None) -> Iterator[Guest]:
    clone = saved.restore(name, guid=guid)
    try:
        yield clone
    finally:
        clone.kill()


def _written(guest: Guest, restores: int) -> list[Series]:
    """Pages of the detector that a clone has for itself, each written to since the snapshot."""
    view.put(guest, _PAGES, Path(softdirty.__file__).read_text())
    found = [_written_since(guest, "as shipped", "frozen", restores)]
    view.put(guest, "/run/systemd/system/vmforkd.service.d/unfrozen.conf", _UNFROZEN)
    guest.check("systemctl", "daemon-reload")
    guest.check("systemctl", "restart", "vmforkd", timeout=120)
    found.append(_written_since(guest, "without gc.freeze()", "unfrozen", restores))
    guest.check("rm", "/run/systemd/system/vmforkd.service.d/unfrozen.conf")
    guest.check("systemctl", "daemon-reload")
    guest.check("systemctl", "restart", "vmforkd", timeout=120)
    return [one for pair in found for one in pair]


def _written_since(guest: Guest, how: str, key: str, restores: int) -> tuple[Series, Series]:
    pid = view.main_pid(guest)
    guest.check("python3", _PAGES, "forget", pid)
    saved = guest.save(go_on=True)
    idle = Series(key=f"written-idle-{key}", what=f"pages written after a restore, no fork: {how}", unit="pages")
    fork = Series(key=f"written-fork-{key}", what=f"pages written by one fork: {how}", unit="pages")
    for number in range(restores):
        for series, guid in ((idle, saved.guid), (fork, uuid.uuid4())):
            with _clone(saved, f"pages-{series.key}-{number}", guid=guid) as clone:
                if series is fork:
                    view.wait_event(clone, after=1)
                else:
                    # The hypervisor's notification has come and was no fork: nothing else ever wakes an idle clone.
                    came = ("grep", "-q", "^ *[1-9]", "/sys/firmware/acpi/interrupts/gpe05")
                    clone.until(*came, what="the notification")
                series.values.append(float(clone.check("python3", _PAGES, "count", pid)))
    return idle, fork
