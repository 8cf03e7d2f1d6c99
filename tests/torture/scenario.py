# SPDX-License-Identifier: Apache-2.0
"""One guest whose detector or reactor may be killed anywhere, and what can be done to it and seen of it.

The detector or the reactor may be started under strace, which kills it somewhere. A detector that died is started
again, without strace, and the play goes on where it stood. What happens is in `plays`, what must hold in `verdict`.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from support.fakeguest import FakeGuest
from support.runningdaemon import environment, write_hook
from torture.table import Row
from torture.wreck import damage
from vmfork.errors import DaemonUnreachable, VmforkError
from vmfork.model import Kind
from vmfork.page import DETECTION_EVENT, STATE_SETTLED, PageContent, read_page
from vmfork.varlink.client import Client

HOOKS = ("10-first", "20-second", "30-third")
PATIENCE_SEC = 60.0
# Two hooks at once, in a guest whose hooks all have an order of their own, are two reactors at once.
_HOOK = """exec 9>>"$VMFORK_ROOT/alone"
flock -n 9 || echo "overlap $VMFORK_HOOK $VMFORK_FORK_TOKEN" >>"$VMFORK_ROOT/ran"
[ "$1" = after-fork ] || { echo "$1 $VMFORK_HOOK" >>"$VMFORK_ROOT/snapshots"; exit; }
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


def problems_of(guest: FakeGuest) -> list[str]:
    """What the daemon's status says is wrong."""
    with Client.connect(guest.paths.admin_socket) as client:
        status = client.call("io.vmfork.GetStatus", {})["status"]
    assert isinstance(status, dict)
    problems = status["problems"]
    assert isinstance(problems, list)
    return [str(problem) for problem in problems]


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Fork:
    """One that was sent: the generation ID that it brought, and the kind that it must be seen as."""

    value: bytes
    kind: Kind


class Broken(Exception):
    """The scenario cannot go on: the sentence says what did not come true."""


# What to put before a command, given where a log may be written.
Words = Callable[[Path], list[str]]


def no_words(_log: Path) -> list[str]:
    """Nothing is done to the program."""
    return []


class Scenario:
    """`detector` and `reactor` make the words to put before one detector, or the n-th reactor: those of strace.

    Which detector gets them, `play` decides: it starts it with `start(victim=True)`. With `may_fail` one may also say
    that it cannot work, and is started again then.
    """

    def __init__(
        self,
        name: str,
        play: Callable[[Scenario], None],
        judge: Callable[[Scenario], None],
        *,
        detector: Words = no_words,
        reactor: Words = no_words,
        reactor_run: int = 1,
        may_fail: bool = False,
    ) -> None:
        self.row = Row(name=name, cases=1)
        self._play, self._judge = play, judge
        self._directory = tempfile.TemporaryDirectory(prefix="vmfork-torture.", dir=scratch())
        self.top = Path(self._directory.name)
        self.guest = FakeGuest(self.top / "guest")
        self.trace = self.top / "trace"
        self._detector = detector(self.trace)
        self._python = interpreter(self.top, reactor(self.trace), first=reactor_run, last=reactor_run)
        self._expected = (-signal.SIGKILL, 1) if may_fail else (-signal.SIGKILL,)
        self.forks: list[Fork] = []
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
            self._play(self)
            self._judge(self)
        except Broken as broken:
            self.row.check(False, f"{broken}; the daemon's last words: {self.last_words()}")
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

    # What can be done to it.

    def start(self, *arguments: str, victim: bool = False) -> None:
        """Start vmforkd; the victim behind the words that kill it."""
        before = self._detector if victim else []
        command = [*before, sys.executable, "-c", LAUNCH, str(self._python), "--root", str(self.guest.root), *arguments]
        self.process = subprocess.Popen(command, env=environment(), stderr=self._log)

    def finish(self) -> int:
        """Wait for a vmforkd that ends by itself, or was killed: a boot goes on in both cases. Its exit status."""
        assert self.process is not None
        try:
            code = self.process.wait(PATIENCE_SEC)
        except subprocess.TimeoutExpired as error:
            raise Broken("it did not end by itself") from error
        if code not in (0, *self._expected):
            raise Broken(f"it ended with exit status {code}")
        if code:
            self._look_at_what_is_left()
        return code

    def fork(self, kind: Kind = Kind.LIVE) -> None:
        """Another generation ID; where the guest runs on, the kernel says so."""
        value = os.urandom(16)
        self.forks.append(Fork(value=value, kind=kind))
        if kind is Kind.LIVE:
            self.guest.fork(value)
        else:
            self.guest.set_generation_id(value)
        self.row.sent += 1

    def power_cycle(self) -> None:
        """What was in RAM is gone, and it is another boot."""
        self.guest.set_boot_id(str(uuid.uuid4()))
        for directory in (self.guest.paths.run_public, self.guest.paths.run_private):
            for path in Path(directory).iterdir():
                path.unlink()
        self._inode = 0

    def go(self) -> None:
        """Let the slow hook end at once from now on."""
        (self.guest.root / "go").touch()

    def kill(self) -> None:
        """End the detector in the middle of whatever it does."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()
        self._look_at_what_is_left()

    def stop(self) -> None:
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
            self.until(self.watches, "who watches came onto the page again")
        raise Broken("the daemon was killed twice")

    def until(self, condition: Callable[[], bool], what: str) -> None:
        """Wait for it, and start a detector that was killed meanwhile again, once."""
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
        self._look_at_what_is_left()
        if code not in self._expected:
            raise Broken(f"the daemon ended by itself with exit status {code}")
        if self.deaths > 1:
            raise Broken("the daemon was killed twice")
        self.start()
        # What the page says of who watches is its predecessor's word until this one listens.
        self.until(lambda: listens(self.guest), "the daemon that was started again listens")

    def _look_at_what_is_left(self) -> None:
        for sentence in damage(self.guest.paths, newest=self._newest, last=1 + len(self.forks)):
            self.row.check(False, sentence)

    # What is seen from outside.

    def page(self) -> PageContent | None:
        """What the page says; None where it is not valid."""
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

    def watches(self) -> bool:
        """The page says that the detector waits for events."""
        page = self.page()
        return page is not None and page.detection == DETECTION_EVENT

    def settled(self) -> bool:
        """The page shows every fork, and the reaction to the last one ended well."""
        page = self.page()
        return page is not None and page.generation == 1 + len(self.forks) and page.state == STATE_SETTLED

    def ran(self, file: str = "ran") -> str:
        """The lines that the hooks left; those that ran for a snapshot left them in the file "snapshots"."""
        with contextlib.suppress(FileNotFoundError):
            return (self.guest.root / file).read_text()
        return ""

    def undone(self) -> bool:
        """Whether every hook of after-snapshot has run since the last one of before-snapshot."""
        last = self.ran("snapshots").rpartition("before-snapshot ")[2]
        return all(f"after-snapshot {hook}\n" in last for hook in HOOKS)

    def last_words(self) -> str:
        """The end of the detectors' log."""
        self._log.flush()
        return " | ".join((self.top / "log").read_text(errors="replace").splitlines()[-3:])
