# SPDX-License-Identifier: Apache-2.0
"""Before a snapshot and after a fork, as programs see it: functions that they registered, called by a real vmforkd."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from support.fakeguest import FakeGuest
from support.runningdaemon import PATIENCE_SEC, RunningDaemon, environment, write_hook

# Says what is called; before a snapshot it takes as long as somebody needs to write a line.
PROGRAM = """
import sys, vmfork
say = lambda word: print(word, flush=True)
vmfork.register_before_snapshot(sys.stdin.readline)
@vmfork.register_before_snapshot
def close():
    say("close")
vmfork.register_before_snapshot(say, "flush")
vmfork.register_after_fork(say, "open")
vmfork.register_after_fork(lambda: say(f"generation {vmfork.generation()}"))
say("ready")
import threading
threading.Event().wait()
"""


class Program:
    """The running program."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.pid = process.pid
        self._process = process

    def says(self, *words: str) -> None:
        assert self._process.stdout is not None
        assert [self._process.stdout.readline().strip() for _ in words] == list(words)

    def goes_on(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()


@contextmanager
def program(guest: FakeGuest, daemon: RunningDaemon) -> Iterator[Program]:
    """A program that is known to be subscribed: a first fork has reached it, and all is settled again."""
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        env=environment() | {"VMFORK_ROOT": str(guest.root)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            made = Program(process)
            made.says("ready")
            guest.fork(os.urandom(16))
            made.says("open", "generation 2")
            daemon.settled(2)
            yield made
        finally:
            process.kill()


@contextmanager
def preparing(guest: FakeGuest) -> Iterator[subprocess.Popen[str]]:
    """`vmforkctl prepare`, still running."""
    command = [sys.executable, "-m", "vmfork", "--root", str(guest.root), "prepare"]
    with subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True) as process:
        yield process


def test_prepare_waits_for_functions_and_a_fork_calls_the_others(guest: FakeGuest) -> None:
    write_hook(guest, "10-a", 'echo "$1" >>"$VMFORK_ROOT/ran"')
    with RunningDaemon(guest) as daemon, program(guest, daemon) as running:
        with preparing(guest) as prepare:
            running.says("flush", "close")
            assert "before-snapshot" not in (guest.root / "ran").read_text()
            assert prepare.poll() is None
            running.goes_on()
            assert prepare.wait(PATIENCE_SEC) == 0
        assert (guest.root / "ran").read_text().split() == ["after-fork", "before-snapshot"]
        guest.fork(os.urandom(16))
        running.says("open", "generation 3")
        assert daemon.settled(3)["state"] == "settled"


def test_a_snapshot_that_is_called_off_may_be_prepared_again(guest: FakeGuest) -> None:
    with RunningDaemon(guest) as daemon, program(guest, daemon) as running:
        for _ in range(2):
            running.goes_on()
            assert daemon.ctl("prepare").returncode == 0
            running.says("flush", "close")
            assert daemon.ctl("resume").returncode == 0
        assert daemon.status()["generation"] == 2


def test_prepare_names_the_program_whose_functions_take_too_long(guest: FakeGuest) -> None:
    guest.put(guest.paths.config_etc + "/vmfork.conf", b"[React]\nAckTimeoutSec=300ms\n")
    with RunningDaemon(guest) as daemon, program(guest, daemon) as running:
        with preparing(guest) as prepare:
            _, complaint = prepare.communicate(timeout=PATIENCE_SEC)
        assert prepare.returncode == 1
        assert "is not ready" in complaint
        assert "python" in complaint
        running.says("flush", "close")
        running.goes_on()
