# SPDX-License-Identifier: Apache-2.0
"""Disk and memory that refuse: strace is attached to a running detector, or put before the reactor, and answers for
the kernel with ENOSPC, EIO, EROFS, EMFILE or ENOMEM. While it does, a fork must reach the page, the watchers and the
hooks, and `status` must name the problem; when it has let go, what was missed must be written by itself.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from support.fakeguest import FakeGuest
from support.runningdaemon import environment, write_hook
from torture.crash import WORKERS
from torture.injection import Injection, strace, strace_of
from torture.scenario import LAUNCH, PATIENCE_SEC, Broken, interpreter, listens, scratch
from torture.table import Row
from vmfork import history, state
from vmfork.errors import VmforkError
from vmfork.page import STATE_REACTING, STATE_SETTLED, read_page
from vmfork.paths import Paths
from vmfork.varlink.client import Client

_FILE_CALLS = ("openat", "write", "fchmod", "fsync", "fdatasync", "rename", "unlink")
ERRORS = ("ENOSPC", "EIO", "EROFS", "EMFILE", "ENOMEM")
_HOOK = 'echo "$VMFORK_GENERATION" >>"$VMFORK_ROOT/ran"'


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
        Fault(name=f"{error} on metrics.prom", error=error, paths=lambda paths: _beside(paths.metrics), told=False)
        for error in ERRORS
    ]
    found += [
        Fault(name=f"{error} in {call}", error=error, calls=(call,), told=False)
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
    """`call` fails with `error` in the first `runs` reactors, on `file` of /run/vmforkd where one is given."""

    call: str
    error: str
    file: str = ""
    runs: int = 1000

    def __str__(self) -> str:
        return f"{self.error} in {self.call} of the reactor" + (f" on {self.file}" if self.file else "")


def reactor_faults() -> list[ReactorFault]:
    """A full or broken /run for as long as there are reactors, and memory or descriptors that two of them lack."""
    lasting = [("write", "ENOSPC"), ("write", "EIO"), ("openat", "ENOSPC"), ("openat", "EROFS"), ("ftruncate", "EIO")]
    passing = [("memfd_create", "ENOMEM"), ("pipe2", "EMFILE"), ("epoll_create1", "EMFILE"), ("connect", "ENOMEM")]
    return [
        *(ReactorFault(call=call, error=error, file="react.hooks") for call, error in lasting),
        *(ReactorFault(call="openat", error=error, file="react.lock", runs=2) for error in ERRORS),
        *(ReactorFault(call=call, error=error, runs=1) for call, error in passing),
    ]


class Attached:
    """strace on a running process for as long as the block lasts."""

    def __init__(self, pid: int, calls: Sequence[str], error: str, paths: Sequence[str]) -> None:
        self._command = strace_of(pid, calls, f"error={error}", paths)
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> None:
        self._process = subprocess.Popen(self._command, stderr=subprocess.PIPE, text=True)
        assert self._process.stderr is not None
        # strace says so when it has hold of the process; what it says about paths comes first.
        for line in self._process.stderr:
            if "attached" in line:
                return
        raise Broken("strace could not be attached")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process is not None
        assert self._process.stderr is not None
        # Asked to end, it lets go of the process, which goes on.
        self._process.send_signal(signal.SIGTERM)
        self._process.wait(PATIENCE_SEC)
        self._process.stderr.close()


class Victim:
    """A guest with one hook and a running detector; a context manager."""

    def __init__(self, name: str) -> None:
        self.row = Row(name=name, cases=1)
        self._directory = tempfile.TemporaryDirectory(prefix="vmfork-torture.", dir=scratch())
        self.top = Path(self._directory.name)
        self.guest = FakeGuest(self.top / "guest")
        write_hook(self.guest, "10-hook", _HOOK)
        self.process: subprocess.Popen[bytes] | None = None
        self.words: list[str] = [sys.executable, "-m", "vmfork.daemon"]

    def __enter__(self) -> Victim:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
        self.guest.close()
        self._directory.cleanup()

    def start(self) -> int:
        self.process = subprocess.Popen(
            [*self.words, "--root", str(self.guest.root)],
            env=environment(),
            stderr=(self.top / "log").open("ab"),
        )
        self.until(lambda: listens(self.guest), "the daemon listens")
        self.until(lambda: read_page(self.guest.paths.generation_page).detection > 0, "the daemon watches")
        return self.process.pid

    def until(self, condition: Callable[[], bool], what: str) -> None:
        end = time.monotonic() + PATIENCE_SEC
        while not condition():
            assert self.process is not None
            if self.process.poll() is not None:
                raise Broken(f"the daemon ended with exit status {self.process.returncode}: {self.last_words()}")
            if time.monotonic() > end:
                raise Broken(f"it did not come true that {what}: {self.last_words()}")
            time.sleep(0.005)

    def last_words(self) -> str:
        return " | ".join((self.top / "log").read_text(errors="replace").splitlines()[-3:])

    def fork(self) -> bytes:
        value = os.urandom(16)
        self.guest.fork(value)
        self.row.sent += 1
        return value

    def shows(self, generation: int) -> bool:
        return read_page(self.guest.paths.generation_page).generation == generation

    def is_over(self) -> bool:
        return read_page(self.guest.paths.generation_page).state != STATE_REACTING

    def ran(self) -> list[str]:
        path = self.guest.root / "ran"
        return path.read_text().split() if path.exists() else []

    def problems(self) -> list[str]:
        with Client.connect(self.guest.paths.admin_socket) as client:
            status = client.call("io.vmfork.GetStatus", {})["status"]
        assert isinstance(status, dict)
        problems = status["problems"]
        assert isinstance(problems, list)
        return [str(problem) for problem in problems]

    def is_written(self, generation: int, value: bytes) -> bool:
        """Disk and memory know of this fork and that it was handled."""
        saved, remembered = state.load_saved(self.guest.paths), state.load_remembered(self.guest.paths)
        events = history.load(self.guest.paths).events
        if saved is None or remembered is None or [one.generation for one in events] != [*range(2, generation + 1)]:
            return False
        return (saved.generation, saved.generation_id, saved.handled_token) == (
            generation,
            value,
            events[-1].token,
        ) and (remembered.generation, remembered.handled) == (generation, True)


def play_detector(fault: Fault) -> Row:
    """A fork while something fails in the detector, and what became of it after."""
    with Victim(fault.name) as victim:
        row = victim.row
        try:
            pid = victim.start()
            with Client.connect(victim.guest.paths.public_socket) as client:
                notices = client.stream("io.vmfork.Subscribe", {})
                next(notices)
                with Attached(pid, fault.calls, fault.error, fault.paths(victim.guest.paths)):
                    value = victim.fork()
                    victim.until(lambda: victim.shows(2), "the page shows the fork")
                    told = next(notices)
                    row.check((told.get("notice"), told.get("generation")) == ("fork", 2), "the watcher was not told")
                    if fault.paths(victim.guest.paths):
                        victim.until(lambda: "2" in victim.ran(), "the hook ran")
                        victim.until(victim.is_over, "the reaction ended")
                        row.check(not fault.told or victim.problems() != [], "status names no problem")
            victim.until(lambda: victim.is_written(2, value), "what was missed is on disk")
            victim.until(lambda: victim.problems() == [], "status names no problem any more")
            row.check(read_page(victim.guest.paths.generation_page).state == STATE_SETTLED, "the fork is not settled")
            _after(victim, value)
        except (Broken, VmforkError) as broken:
            row.check(False, str(broken))
        row.hooks += len(victim.ran())
        return row


def play_reactor(fault: ReactorFault) -> Row:
    """A fork while something fails in each reactor: its hook runs all the same, sooner or later."""
    with Victim(str(fault)) as victim:
        row = victim.row
        try:
            path = f"{victim.guest.paths.run_private}/{fault.file}" if fault.file else None
            error = Injection(call=fault.call, when="1+", fault=f"error={fault.error}", path=path)
            python = interpreter(victim.top, strace(injections=[error]), first=1, last=fault.runs)
            victim.words = [sys.executable, "-c", LAUNCH, str(python)]
            victim.start()
            value = victim.fork()
            victim.until(lambda: "2" in victim.ran(), "the hook ran")
            victim.until(victim.is_over, "the reaction ended")
            row.check(read_page(victim.guest.paths.generation_page).state == STATE_SETTLED, "the reaction failed")
            _after(victim, value)
        except (Broken, VmforkError) as broken:
            row.check(False, str(broken))
        row.hooks += len(victim.ran())
        return row


def _after(victim: Victim, before: bytes) -> None:
    """All is well again: the next fork is one fork."""
    value = victim.fork()
    victim.until(lambda: victim.shows(3), "the page shows the next fork")
    victim.until(lambda: victim.is_written(3, value), "the next fork is on disk")
    events = history.load(victim.guest.paths).events
    victim.row.seen += len(events)
    victim.row.check([one.generation_id for one in events] == [before, value], "the history has other IDs")
    victim.row.check("3" in victim.ran(), "the hook did not run for the next fork")


def fault_rows(*, every: int = 1) -> Iterator[Row]:
    """Two rows: faults in the detector, faults in the reactor; with `every` n only each n-th case."""
    row = Row(name="disk and memory, detector")
    with ThreadPoolExecutor(WORKERS) as pool:
        for result in pool.map(play_detector, detector_faults()[::every]):
            row.add(result)
        yield row
        row = Row(name="disk and memory, reactor")
        for result in pool.map(play_reactor, reactor_faults()[::every]):
            row.add(result)
        yield row
