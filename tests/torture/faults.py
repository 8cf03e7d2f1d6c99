# SPDX-License-Identifier: Apache-2.0
"""Disk and memory that refuse: strace is attached to a running detector, or put before the reactor, and answers for
the kernel with ENOSPC, EIO, EROFS, EMFILE or ENOMEM. While it does, a fork must reach the page, the watchers and the
hooks, and `status` must name the problem; when it has let go, what was missed must be written by itself.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from torture.crash import WORKERS
from torture.filesystems import PLAYS, play_file_system
from torture.injection import Attached, Injection, strace, strace_of
from torture.liveguest import LiveGuest
from torture.scenario import LAUNCH, Broken, interpreter
from torture.starts import play_start, start_faults
from torture.table import Row
from vmfork import history
from vmfork.errors import VmforkError
from vmfork.page import STATE_SETTLED, read_page
from vmfork.paths import Paths
from vmfork.varlink.client import Client

_FILE_CALLS = ("openat", "write", "fchmod", "fsync", "fdatasync", "rename", "unlink")
ERRORS = ("ENOSPC", "EIO", "EROFS", "EMFILE", "ENOMEM")


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """`calls` on `paths` (any path without them) fail with `error`. `told`: `status` must name it as a problem."""

    name: str
    error: str
    calls: tuple[str, ...] = _FILE_CALLS
    paths: Callable[[Paths], Sequence[str]] = lambda _paths: ()
    told: bool = True


def _beside(path: str) -> tuple[str, ...]:
    return (path, f"{path}.new", os.path.dirname(path))


_FILES: dict[str, Callable[[Paths], Sequence[str]]] = {
    "state.json": lambda paths: _beside(paths.state),
    "history.jsonl": lambda paths: (paths.history,),
    "detector.json": lambda paths: _beside(paths.detector_memory),
    "all of /var": lambda paths: (*_beside(paths.state), paths.history),
    "all of /var and /run": lambda paths: (
        *_beside(paths.state),
        paths.history,
        *_beside(paths.detector_memory),
        *_beside(paths.metrics),
    ),
}


def _intent(paths: Paths) -> Sequence[str]:
    return (paths.detector_intent,)


def detector_faults() -> list[Fault]:
    """Every error on all calls of every file, EIO on each call by itself, and what is no file."""
    found = [
        Fault(name=f"{error} on {name}", error=error, paths=paths) for name, paths in _FILES.items() for error in ERRORS
    ]
    found += [
        Fault(name=f"EIO in {call} of {name}", error="EIO", calls=(call,), paths=_FILES[name])
        for name, calls in (
            ("state.json", ("openat", "write", "fchmod", "fsync", "rename")),
            ("history.jsonl", ("openat", "write", "fdatasync")),
            ("detector.json", ("openat", "write", "fchmod", "rename")),
        )
        for call in calls
    ]
    found += [
        Fault(name=f"{error} on detector.intent", error=error, calls=("pwrite64",), paths=_intent)
        for error in ("EIO", "ENOSPC")
    ]
    found += [
        Fault(name=f"{error} on metrics.prom", error=error, paths=lambda paths: _beside(paths.metrics))
        for error in ERRORS
    ]
    found += [
        # Who cannot be accepted cannot be told either.
        Fault(name=f"{error} in {call}", error=error, calls=(call,), told=call != "accept4")
        for call, error in (
            ("pidfd_open", "EMFILE"),
            ("clone3", "ENOMEM"),
            ("clone3", "EAGAIN"),
            ("accept4", "EMFILE"),
            ("accept4", "ENFILE"),
            ("accept4", "ENOMEM"),
        )
    ]
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class ReactorFault:
    """`call` fails with `error` in the first `runs` reactors, at the times `when`, on `file` where one is named.

    `told`: none of them comes to a result, and `status` must say so; they are let go only then.
    """

    call: str
    error: str
    file: str = ""
    when: str = "1+"
    runs: int = 1000
    told: bool = False

    def __str__(self) -> str:
        where = f" on {self.file}" if self.file else ""
        return f"{self.error} in {self.call.replace('?', '')} of the reactor{where}"

    def injection(self, paths: Paths) -> Injection:
        path = _REACTOR_FILES[self.file](paths) if self.file else None
        return Injection(call=self.call, when=self.when, fault=f"error={self.error}", path=path)


_REACTOR_FILES: dict[str, Callable[[Paths], str]] = {
    "react.hooks": lambda paths: paths.react_hooks,
    "react.lock": lambda paths: paths.react_lock,
    "hooks.d": lambda paths: paths.hooks_etc,
    "vmfork.conf": lambda paths: f"{paths.config_etc}/vmfork.conf",
}


def reactor_faults() -> list[ReactorFault]:
    """A full or broken /run, what cannot be read, and memory, processes or descriptors that are lacking for a while."""
    lasting = [("write", "ENOSPC"), ("write", "EIO"), ("openat", "ENOSPC"), ("openat", "EROFS"), ("ftruncate", "EIO")]
    passing = [("memfd_create", "ENOMEM"), ("pipe2", "EMFILE"), ("epoll_create1", "EMFILE"), ("connect", "ENOMEM")]
    # At the start of the hook: the reactor itself tries again.
    starting = [("clone,?clone3,?vfork", "EAGAIN"), ("clone,?clone3,?vfork", "ENOMEM"), ("pidfd_open", "EMFILE")]
    unread = [(call, error) for call in ("openat", "getdents64") for error in ("EIO", "EMFILE")]
    return [
        *(ReactorFault(call=call, error=error, file="react.hooks") for call, error in lasting),
        *(ReactorFault(call="openat", error=error, file="react.lock", runs=2) for error in ERRORS),
        *(ReactorFault(call=call, error=error, runs=1) for call, error in passing),
        *(ReactorFault(call=call, error=error, when="1", runs=1) for call, error in starting),
        *(ReactorFault(call=call, error=error, file="hooks.d", told=True) for call, error in unread),
        *(ReactorFault(call="openat", error=error, file="vmfork.conf") for error in ("EIO", "EMFILE")),
    ]


def play_detector(fault: Fault) -> Row:
    """A fork while something fails in the detector, and what became of it after."""
    with LiveGuest(fault.name) as live:
        row = live.row
        try:
            pid = live.start()
            with Client.connect(live.guest.paths.public_socket) as client:
                notices = client.stream("io.vmfork.Subscribe", {})
                next(notices)
                broken = fault.paths(live.guest.paths)
                with Attached(strace_of(pid, fault.calls, f"error={fault.error}", broken)):
                    value = live.fork()
                    live.until(lambda: live.shows(2), "the page shows the fork")
                    told = next(notices)
                    row.check((told.get("notice"), told.get("generation")) == ("fork", 2), "the watcher was not told")
                    if broken:
                        live.until(lambda: "2" in live.ran(), "the hook ran")
                        live.until(live.is_over, "the reaction ended")
                    if fault.told:
                        live.until(lambda: live.problems() != [], "status names a problem")
            live.until(lambda: live.is_written(2, value), "what was missed is on disk")
            live.until(lambda: live.problems() == [], "status names no problem any more")
            row.check(read_page(live.guest.paths.generation_page).state == STATE_SETTLED, "the fork is not settled")
            _after(live, value)
        except (Broken, VmforkError) as error:
            row.check(False, str(error))
        row.hooks += len(live.ran())
        return row


def play_reactor(fault: ReactorFault) -> Row:
    """A fork while something fails in each reactor: its hook runs all the same, sooner or later."""
    with LiveGuest(str(fault)) as live:
        row = live.row
        try:
            live.configure("[React]\nTimeoutSec=20\n")
            words = strace(injections=[fault.injection(live.guest.paths)])
            python = interpreter(live.top, words, first=1, last=fault.runs)
            live.words = [sys.executable, "-c", LAUNCH, str(python)]
            live.start()
            value = live.fork()
            if fault.told:
                live.until(lambda: live.problems() != [], "status names a problem")
                row.check(live.ran() == [], "a hook ran, though nobody could know which ones are to")
                interpreter(live.top, [], first=1, last=0)
            live.until(lambda: "2" in live.ran(), "the hook ran")
            live.until(live.is_over, "the reaction ended")
            row.check(live.problems() == [], "status names a problem that is none any more")
            row.check(read_page(live.guest.paths.generation_page).state == STATE_SETTLED, "the reaction failed")
            _after(live, value)
        except (Broken, VmforkError) as error:
            row.check(False, str(error))
        row.hooks += len(live.ran())
        return row


def _after(live: LiveGuest, before: bytes) -> None:
    """All is well again: the next fork is one fork."""
    value = live.fork()
    live.until(lambda: live.shows(3), "the page shows the next fork")
    live.until(lambda: live.is_written(3, value), "the next fork is on disk")
    events = history.load(live.guest.paths).events
    live.row.seen += len(events)
    live.row.check([one.generation_id for one in events] == [before, value], "the history has other IDs")
    live.row.check("3" in live.ran(), "the hook did not run for the next fork")


def fault_rows(*, every: int = 1) -> Iterator[Row]:
    """A row for the detector, one for its start, one for the reactor; with `every` n only each n-th case."""
    file_systems = [*PLAYS] if os.geteuid() == 0 else []
    with ThreadPoolExecutor(WORKERS) as pool:
        row = Row(name="disk and memory, detector")
        for result in pool.map(play_detector, detector_faults()[::every]):
            row.add(result)
        yield row
        row = Row(name="disk and memory, start", note="" if file_systems else "without what needs root")
        for result in (
            *pool.map(play_start, start_faults()[::every]),
            *pool.map(play_file_system, file_systems),
        ):
            row.add(result)
        yield row
        row = Row(name="disk and memory, reactor")
        for result in pool.map(play_reactor, reactor_faults()[::every]):
            row.add(result)
        yield row
