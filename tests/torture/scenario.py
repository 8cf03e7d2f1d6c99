# SPDX-License-Identifier: Apache-2.0
"""One guest through a start, a fork, a reaction, a fork during the reaction and a stop, whatever is done to it.

The detector or the reactor may be started under strace, which kills it somewhere. A detector that died is started
again, without strace, and the scenario goes on where it stood. At its end everything that must hold does, or is named.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from support.fakeguest import FakeGuest
from support.runningdaemon import environment, write_hook
from torture.table import Row
from vmfork import history, state
from vmfork.errors import DaemonUnreachable, VmforkError
from vmfork.model import EventState
from vmfork.page import DETECTION_EVENT, DETECTION_NONE, STATE_SETTLED, PageContent, read_page
from vmfork.varlink.client import Client

HOOKS = ("10-first", "20-second", "30-third")
PATIENCE_SEC = 60.0
# Two hooks at once, in a guest whose hooks all have an order of their own, are two reactors at once.
_HOOK = """exec 9>>"$VMFORK_ROOT/alone"
flock -n 9 || echo "overlap $VMFORK_HOOK $VMFORK_FORK_TOKEN" >>"$VMFORK_ROOT/ran"
echo "start $VMFORK_HOOK $VMFORK_FORK_TOKEN" >>"$VMFORK_ROOT/ran"
[ "$VMFORK_HOOK" != 20-second ] || [ -e "$VMFORK_ROOT/go" ] || sleep 30
echo "end $VMFORK_HOOK $VMFORK_FORK_TOKEN" >>"$VMFORK_ROOT/ran\""""
# The daemon starts the reactor as `sys.executable -m vmfork`: put another program in its place.
LAUNCH = (
    "import runpy, sys; sys.executable = sys.argv.pop(1); "
    "runpy.run_module('vmfork.daemon', run_name='__main__', alter_sys=True)"
)


def scratch() -> Path:
    """Where guests are made: in RAM where there is room, so that fsync costs what it costs in /run."""
    shared = Path("/dev/shm")
    return shared if os.access(shared, os.W_OK) else Path(tempfile.gettempdir())


def listens(guest: FakeGuest) -> bool:
    """Whether a daemon, not only its socket, is there."""
    try:
        Client.connect(guest.paths.admin_socket).close()
    except DaemonUnreachable:
        return False
    return True


def interpreter(directory: Path, before: list[str], *, first: int, last: int) -> Path:
    """A program to take for Python: Python, behind these words from the first to the last of the times it is run."""
    wrapper, count = directory / "python", directory / "runs"
    wrapper.write_text(
        f"#!/bin/sh\necho >>{count}\nnumber=$(wc -l <{count})\n"
        f"[ $number -ge {first} ] && [ $number -le {last} ] && "
        f'exec {" ".join(before)} {sys.executable} "$@"\n'
        f'exec {sys.executable} "$@"\n'
    )
    wrapper.chmod(0o755)
    return wrapper


class Broken(Exception):
    """The scenario cannot go on: the sentence says what did not come true."""


# What to put before a command, given where a log may be written.
Words = Callable[[Path], list[str]]


def _nothing(_log: Path) -> list[str]:
    return []


class Scenario:
    """`detector` and `reactor` make the words to put before the first detector, or the n-th reactor: those of strace.

    With `reactor_run` n the n-th reactor is the one that gets them. With `recovering` the first detector is killed in
    the middle of the first reaction, the second fork happens while nobody watches, and `detector` is the second one.
    """

    def __init__(
        self,
        name: str,
        *,
        detector: Words = _nothing,
        reactor: Words = _nothing,
        reactor_run: int = 1,
        recovering: bool = False,
    ) -> None:
        self.row = Row(name=name, cases=1)
        self._directory = tempfile.TemporaryDirectory(prefix="vmfork-torture.", dir=scratch())
        self.top = Path(self._directory.name)
        self.guest = FakeGuest(self.top / "guest")
        self.trace = self.top / "trace"
        self._detector = detector(self.trace)
        self._python = interpreter(self.top, reactor(self.trace), first=reactor_run, last=reactor_run)
        self._recovering = recovering
        self._ids: list[bytes] = []
        self._newest = 0
        self._inode = 0
        self.deaths = 0
        self.traced = ""
        self.process: subprocess.Popen[bytes] | None = None
        self._log = (self.top / "log").open("ab")

    def run(self) -> Row:
        """Play it; the row says what was sent, seen and run, and what was broken."""
        try:
            for hook in HOOKS:
                write_hook(self.guest, hook, _HOOK)
            self._play()
            self._judge()
        except Broken as broken:
            self.row.check(False, f"{broken}; the daemon's last words: {self._last_words()}")
        finally:
            if self.process is not None and self.process.poll() is None:
                self.process.kill()
                self.process.wait()
            with contextlib.suppress(FileNotFoundError):
                self.traced = self.trace.read_text(errors="replace")
            self._log.close()
            self.guest.close()
            self._directory.cleanup()
        return self.row

    def _play(self) -> None:
        if self._recovering:
            self._start([])
        else:
            self._start(self._detector)
        self._until(self._watches, "who watches came onto the page")
        self._fork()
        self._until(lambda: self.generation() == 2, "the first fork came onto the page")
        self._until(lambda: "start 20-second" in self.ran(), "the second hook ran")
        if self._recovering:
            assert self.process is not None
            self.process.kill()
            self.process.wait()
        (self.guest.root / "go").touch()
        self._fork()
        if self._recovering:
            self._start(self._detector)
        self._until(lambda: self.generation() == 3, "the second fork came onto the page")
        self._until(self._settled, "the second fork settled")
        self._stop()

    # The pieces of it.

    def _start(self, before: list[str]) -> None:
        self.process = subprocess.Popen(
            [*before, sys.executable, "-c", LAUNCH, str(self._python), "--root", str(self.guest.root)],
            env=environment(),
            stderr=self._log,
        )

    def _fork(self) -> None:
        self._ids.append(os.urandom(16))
        self.guest.fork(self._ids[-1])
        self.row.sent += 1

    def _stop(self) -> None:
        """Ask it to end; a detector that is killed while it does so is started and asked again."""
        for _ in range(2):
            assert self.process is not None
            self.process.terminate()
            try:
                code = self.process.wait(PATIENCE_SEC)
            except subprocess.TimeoutExpired as error:
                raise Broken("the daemon did not end when it was told to") from error
            if code == 0:
                return
            self._died(code)
            self._until(self._watches, "who watches came onto the page again")
        raise Broken("the daemon was killed twice")

    def _until(self, condition: Callable[[], bool], what: str) -> None:
        end = time.monotonic() + PATIENCE_SEC
        while not condition():
            assert self.process is not None
            code = self.process.poll()
            if code is not None:
                self._died(code)
            if time.monotonic() > end:
                raise Broken(f"it did not come true that {what}")
            time.sleep(0.003)
            self.generation()

    def _died(self, code: int) -> None:
        self.deaths += 1
        if code != -signal.SIGKILL:
            raise Broken(f"the daemon ended by itself with exit status {code}")
        if self.deaths > 1:
            raise Broken("the daemon was killed twice")
        self._start([])
        # What the page says of who watches is its predecessor's word until this one listens.
        self._until(lambda: listens(self.guest), "the daemon that was started again listens")

    # What is seen from outside.

    def page(self) -> PageContent | None:
        try:
            return read_page(self.guest.paths.generation_page)
        except VmforkError:
            return None

    def generation(self) -> int:
        """What the page says now; a step back is a violation."""
        page = self.page()
        if page is None:
            return 0
        self.row.check(page.generation >= self._newest, f"the generation went from {self._newest} to {page.generation}")
        self._newest = max(self._newest, page.generation)
        inode = os.stat(self.guest.paths.generation_page).st_ino
        self.row.check(self._inode in (0, inode), "the page is another file now")
        self._inode = inode
        return page.generation

    def _watches(self) -> bool:
        page = self.page()
        return page is not None and page.detection == DETECTION_EVENT

    def _settled(self) -> bool:
        page = self.page()
        return page is not None and page.generation == 3 and page.state == STATE_SETTLED

    def ran(self) -> str:
        with contextlib.suppress(FileNotFoundError):
            return (self.guest.root / "ran").read_text()
        return ""

    def _last_words(self) -> str:
        self._log.flush()
        return " | ".join((self.top / "log").read_text(errors="replace").splitlines()[-3:])

    # The verdict.

    def _judge(self) -> None:
        row, paths = self.row, self.guest.paths
        page = self.page()
        row.check(page is not None and page.generation == 3, "the page is not valid, or not at generation 3")
        row.check(
            page is not None and page.detection == DETECTION_NONE, "after the stop the page says somebody watches"
        )
        try:
            saved, remembered = state.load_saved(paths), state.load_remembered(paths)
            found = history.load(paths)
        except VmforkError as error:
            row.check(False, f"a file is broken: {error}")
            return
        row.check(not any(Path(paths.state).parent.glob("*.broken")), "the daemon found its own state broken")
        events = found.events
        row.seen += len(events)
        row.check([event.generation for event in events] == [2, 3], f"the history has {[e.generation for e in events]}")
        row.check([event.generation_id for event in events] == self._ids, "the history has other IDs than were sent")
        row.check(len({event.token for event in events}) == len(events), "two forks have one token")
        row.check(found.unreadable_lines == 0, f"{found.unreadable_lines} lines of the history cannot be read")
        if not events or saved is None or remembered is None:
            row.check(False, "the history, the state or the memory is missing")
            return
        newest = events[-1]
        row.check(newest.state is EventState.SETTLED, f"the newest fork is {newest.state}")
        row.check(saved.handled_token == newest.token, "the newest fork is not the handled one on disk")
        row.check(saved.generation_id == self._ids[-1] and saved.generation == 3, "the state on disk is an older one")
        row.check(remembered.handled and remembered.event is not None, "the memory says the fork is not handled")
        row.check(page is not None and page.token == newest.token, "the page has another token than the history")
        ran = self.ran().splitlines()
        row.hooks += sum(line.startswith("end ") for line in ran)
        for hook in HOOKS:
            row.check(f"end {hook} {newest.token.hex()}" in ran, f"{hook} did not run for the newest fork")
        tokens = {line.split()[2] for line in ran if line.startswith("start ")}
        row.check(tokens <= {event.token.hex() for event in events}, "a hook ran for a fork that nobody recorded")
        row.check(not any(line.startswith("overlap ") for line in ran), "two reactors ran at once")
