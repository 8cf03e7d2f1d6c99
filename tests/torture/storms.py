# SPDX-License-Identifier: Apache-2.0
"""Storms: forks as fast as they can be told apart, floods of foreign lines, lost records, forks at bad moments.

Each fork is awaited on the page before the next is sent, because only the last of several IDs can be seen: so the
counts must match exactly. Where one could not be waited for, nothing is claimed.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from torture.injection import Attached, strace_of
from torture.liveguest import LiveGuest
from torture.scenario import PATIENCE_SEC, Broken
from torture.table import Row
from vmfork import history
from vmfork.errors import VmforkError
from vmfork.page import GENERATION_OFFSET, PAGE_SIZE, read_page

_RSS_PER_1000_FORKS = 1 << 20
_FOREIGN = b"6,1,1,-;systemd[1]: Started a unit that has nothing to do with forks at all.\n"


def rss(pid: int) -> int:
    """Resident bytes of a process."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


class _Counter:
    """The generation, mapped as a program in the guest would."""

    def __init__(self, path: str) -> None:
        with open(path, "rb") as file:
            self._map = mmap.mmap(file.fileno(), PAGE_SIZE, prot=mmap.PROT_READ)
        self._view = memoryview(self._map).cast("Q")

    def wait_for(self, generation: int) -> None:
        end = time.monotonic() + PATIENCE_SEC
        while (now := self._view[GENERATION_OFFSET // 8]) != generation:
            if now > generation:
                raise Broken(f"{generation - 1} forks were sent and {now - 1} seen")
            if time.monotonic() > end:
                raise Broken(f"the page stays at {now}, not {generation}")
            time.sleep(0.0002)


def in_a_row(forks: int) -> Row:
    """Each fork the moment the page shows the one before; the daemon's memory must not follow their number."""
    with LiveGuest("forks in a row") as live:
        row = live.row
        with _broken_is_a_violation(row):
            pid = live.start()
            counter = _Counter(live.guest.paths.generation_page)
            warm_up = forks // 5
            before, open_before, began = 0, 0, time.monotonic()
            for number in range(1, forks + 1):
                live.fork()
                counter.wait_for(number + 1)
                if number == warm_up:
                    before, open_before = rss(pid), descriptors(pid)
            rate = forks / (time.monotonic() - began)
            grown = rss(pid) - before
            live.until(live.is_over, "the last fork settled")
            live.until(lambda: str(forks + 1) in live.ran(), "the hook ran for the last fork")
            row.seen += read_page(live.guest.paths.generation_page).generation - 1
            kept = live.events()
            row.check(kept == list(range(forks + 2 - len(kept), forks + 2)), "the history has a gap")
            row.check(len(kept) == min(forks, history.KEPT), f"the history keeps {len(kept)}")
            allowed = _RSS_PER_1000_FORKS * max(1, (forks - warm_up) // 1000)
            row.check(grown <= allowed, f"{grown} bytes more after {forks - warm_up} forks")
            row.check(descriptors(pid) <= open_before + 2, "descriptors were left open")
            row.hooks += len(live.ran())
            row.note = f"{rate:.0f}/s, RSS {grown / 1024:+.0f} KiB"
        return row


def flood(lines: int, forks: int) -> Row:
    """Foreign lines without end, a fork in the middle of them now and then."""
    with LiveGuest("foreign kernel log lines") as live:
        row = live.row
        with _broken_is_a_violation(row), open(live.guest.paths.kmsg, "wb", buffering=0) as log:
            live.start()
            counter = _Counter(live.guest.paths.generation_page)
            block = _FOREIGN * 50
            began = time.monotonic()
            for number in range(1, forks + 1):
                for _ in range(lines // forks // 50):
                    log.write(block)
                live.fork()
                counter.wait_for(number + 1)
            rate = lines / (time.monotonic() - began)
            live.until(live.is_over, "the last fork settled")
            row.seen += len(live.events())
            row.hooks += len(live.ran())
            row.note = f"{lines} lines, {rate / 1000:.0f} thousand/s"
        return row


def overruns(forks: int) -> Iterator[Row]:
    """Reads of the log that fail with EPIPE, as when the ring overtook its reader."""
    for name, readable in (("overruns, ID readable", True), ("overruns, ID unreadable", False)):
        with LiveGuest(name) as live:
            row = live.row
            if not readable:
                Path(live.guest.paths.fw_cfg_guid).unlink()
            _interrupts(live, 0)
            with _broken_is_a_violation(row):
                pid = live.start()
                kmsg = live.guest.paths.kmsg
                for number in range(1, forks + 1):
                    with Attached(strace_of(pid, ("read",), "error=EPIPE:when=1+2", (kmsg,))):
                        live.guest.kmsg_line("an innocent line")
                        if readable:
                            live.fork()
                        else:
                            # The kernel's word is lost with the records; its interrupt counter is not.
                            _interrupts(live, number)
                            row.sent += 1
                            live.guest.kmsg_line("the first line after what was lost")
                        live.until(lambda wanted=number + 1: live.shows(wanted), "the page shows the fork")  # type: ignore[misc]
                live.until(live.is_over, "the last fork settled")
                live.until(lambda: len(live.events()) == forks, "the history has all forks, and no other")
                row.seen += len(live.events())
                row.hooks += len(live.ran())
            yield row


def _interrupts(live: LiveGuest, count: int) -> None:
    live.guest.put(live.guest.paths.interrupts, b"CPU0\n  9: %d IO-APIC vmgenid\n" % count)


def at_bad_moments(cases: int, *, seed: int = 8) -> Iterator[Row]:
    """One fork at a random moment of a start, a reload, a shutdown and a reaction, again and again."""
    for name, disturb in (
        ("fork during the start", _while_starting),
        ("fork during a reload", _while_reloading),
        ("fork during the shutdown", _while_stopping),
        ("fork during the reaction", _while_reacting),
    ):
        chance = random.Random(seed)
        with LiveGuest(name, hook='sleep 0.05; echo "$VMFORK_GENERATION" >>"$VMFORK_ROOT/ran"') as live:
            row = live.row
            with _broken_is_a_violation(row):
                live.start()
                for number in range(1, cases + 1):
                    disturb(live, chance)
                    live.until(lambda wanted=number + 1: live.shows(wanted), "the page shows the fork")  # type: ignore[misc]
                live.until(lambda: str(cases + 1) in live.ran(), "the hook ran for the last fork")
                live.until(live.is_over, "the last fork settled")
                live.until(lambda: live.events() == list(range(2, cases + 2)), "the history has exactly these forks")
                row.seen += len(live.events())
                row.hooks += len(live.ran())
                row.cases = cases
            yield row


def _later(seconds: float, action: Callable[[], object]) -> None:
    timer = threading.Timer(seconds, action)
    timer.start()
    timer.join()


def _while_starting(live: LiveGuest, chance: random.Random) -> None:
    live.stop()
    live.launch()
    _later(chance.uniform(0, 0.25), live.fork)
    live.await_watching()


def _while_reloading(live: LiveGuest, chance: random.Random) -> None:
    assert live.process is not None
    live.process.send_signal(signal.SIGHUP)
    _later(chance.uniform(0, 0.004), live.fork)
    live.process.send_signal(signal.SIGHUP)


def _while_stopping(live: LiveGuest, chance: random.Random) -> None:
    assert live.process is not None
    live.process.terminate()
    _later(chance.uniform(0, 0.02), live.fork)
    live.row.check(live.process.wait(PATIENCE_SEC) == 0, f"the daemon ended badly: {live.last_words()}")
    live.start()


def _while_reacting(live: LiveGuest, chance: random.Random) -> None:
    _later(chance.uniform(0, 0.3), live.fork)


@contextlib.contextmanager
def _broken_is_a_violation(row: Row) -> Iterator[None]:
    try:
        yield
    except (Broken, VmforkError) as broken:
        row.check(False, str(broken))


def storms(*, every: int = 1) -> dict[str, Callable[[], Iterator[Row]]]:
    """All of them, by name; with `every` n each is an n-th as long."""
    return {
        "forks in a row": lambda: iter([in_a_row(10_000 // every)]),
        "foreign kernel log lines": lambda: iter([flood(1_000_000 // every, 20)]),
        "overruns": lambda: overruns(20),
        "bad moments": lambda: at_bad_moments(max(1, 100 // every)),
    }
