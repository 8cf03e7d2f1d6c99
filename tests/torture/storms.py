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

from torture.injection import INJECTED, Attached, strace_of
from torture.liveguest import LiveGuest
from torture.scenario import PATIENCE_SEC, Broken
from torture.table import Row
from vmfork import history, state
from vmfork.edges.kmsg import FORK_LINE
from vmfork.errors import VmforkError
from vmfork.page import GENERATION_OFFSET, PAGE_SIZE, read_page

# What 8000 forks may cost in memory, and how much of it any number of them may: a page here and there. A leak of one
# event for each fork is 260 KiB in 800.
_RSS_PER_FORK = (1 << 20) / 8000
_RSS_NOISE = 128 << 10
_FORK = b"5,1,1,-;%s\n" % FORK_LINE
# A process may write anything, but not as the kernel.
_FORGED = b"13,1,1,-;%s\n" % FORK_LINE
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

    @property
    def generation(self) -> int:
        return self._view[GENERATION_OFFSET // 8]

    def wait_for(self, generation: int, meanwhile: Callable[[], object] = lambda: time.sleep(0.0002)) -> None:
        end = time.monotonic() + PATIENCE_SEC
        while (now := self.generation) != generation:
            if now > generation:
                raise Broken(f"{generation - 1} forks were sent and {now - 1} seen")
            if time.monotonic() > end:
                raise Broken(f"the page stays at {now}, not {generation}")
            meanwhile()


def in_a_row(forks: int, *, warm_up: int) -> Row:
    """Each fork the moment the page shows the one before; the daemon's memory must not follow their number.

    It has grown when the history is cut for the first time, soon after its thousandth line: before the end of the
    warm-up, or never.
    """
    with LiveGuest("forks in a row") as live:
        row = live.row
        with _broken_is_a_violation(row):
            pid = live.start()
            counter = _Counter(live.guest.paths.generation_page)
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
            allowed = max(_RSS_NOISE, _RSS_PER_FORK * (forks - warm_up))
            row.check(grown <= allowed, f"{grown} bytes more after {forks - warm_up} forks")
            row.check(descriptors(pid) <= open_before + 2, "descriptors were left open")
            row.hooks += len(live.ran())
            row.note = f"{rate:.0f}/s, RSS {grown / 1024:+.0f} KiB in the last {forks - warm_up}"
        return row


def burst(forks: int) -> Row:
    """Forks as fast as they can be sent, none awaited: the last is seen, whatever became of those before it."""
    with LiveGuest("forks nobody waits for") as live:
        row = live.row
        row.coalesces = True
        with _broken_is_a_violation(row):
            live.start()
            for _ in range(forks):
                last = live.fork()
            live.until(lambda: live.last_id() == last, "the history ends with the last fork")
            live.until(live.is_over, "the last fork settled")
            row.seen += read_page(live.guest.paths.generation_page).generation - 1
            row.check(live.events() == list(range(2, row.seen + 2)), "page and history differ")
            row.hooks += len(live.ran())
            row.note = "coalesces"
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


def flood_with_overruns(lines: int, forks: int, *, readable: bool) -> Row:
    """Foreign and forged lines without end; every seventh read finds that the ring overtook it. Forks among them.

    In turn a fork's own line is read with the others, is lost with them, and is read when other signs have already
    told of the fork. One fork each time.
    """
    with LiveGuest(f"flood with overruns, ID {'readable' if readable else 'unreadable'}") as live:
        row, trace, written = live.row, live.top / "trace", 0
        if not readable:
            Path(live.guest.paths.fw_cfg_guid).unlink()
        _interrupts(live, 0)
        with _broken_is_a_violation(row), open(live.guest.paths.kmsg, "wb", buffering=0) as log:

            def foreign() -> None:
                nonlocal written
                log.write(_FOREIGN * 50 + _FORGED)
                written += 51

            pid = live.start()
            counter = _Counter(live.guest.paths.generation_page)
            overrun = strace_of(pid, ("read",), "error=EPIPE:when=1+7", (live.guest.paths.kmsg,), log=trace)
            with Attached(overrun):
                for number in range(1, forks + 1):
                    while written < lines * number // forks:
                        foreign()
                    # The kernel counts the interrupt before it writes its line.
                    _interrupts(live, number)
                    if readable:
                        live.guest.set_generation_id(os.urandom(16))
                    row.sent += 1
                    if number % 3 == 1:
                        log.write(_FORK)
                    counter.wait_for(number + 1, foreign)
                    if number % 3 == 0:
                        log.write(_FORK)
                    # A fork whose line is lost, too, right behind another one is not told from it by its counter.
                    live.until(lambda wanted=number: _noted(live) == wanted, "the counters are remembered")  # type: ignore[misc]
                # Whatever is still to be read makes no fork.
                for _ in range(50):
                    foreign()
            live.until(live.is_over, "the last fork settled")
            live.until(lambda: len(live.events()) >= forks, "the history has all forks")
        row.seen += read_page(live.guest.paths.generation_page).generation - 1
        row.hooks += len(live.ran())
        lost = trace.read_text().count(INJECTED)
        row.check(lost >= forks, f"only {lost} overruns")
        row.note = f"{written} lines, {lost} overruns"
        return row


def _noted(live: LiveGuest) -> int | None:
    remembered = state.load_remembered(live.guest.paths)
    return None if remembered is None else remembered.interrupts.get("vmgenid")


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
    """All of them, by name; with `every` n each is about an n-th as long."""
    forks, warm_up = (10_000, 2_000) if every == 1 else (1_000, 200)
    return {
        "forks in a row": lambda: iter([in_a_row(forks, warm_up=warm_up)]),
        "forks nobody waits for": lambda: iter([burst(200)]),
        "foreign kernel log lines": lambda: iter([flood(1_000_000 // every, 20)]),
        "overruns": lambda: overruns(20),
        "flood with overruns": lambda: (
            flood_with_overruns(1_000_000 // every, 60, readable=readable) for readable in (True, False)
        ),
        "bad moments": lambda: at_bad_moments(max(1, 100 // every)),
    }
