# SPDX-License-Identifier: Apache-2.0
"""What a person at a terminal sees of `rotate` and `trigger` while the hooks run."""

from __future__ import annotations

import os
import pty
import re
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest

from support.fakeguest import FakeGuest
from support.runningdaemon import PATIENCE_SEC, RunningDaemon, environment, write_hook


class Watched:
    """A verb that runs on a terminal, read while it runs."""

    def __init__(self, guest: FakeGuest, *arguments: str, **more: str) -> None:
        self._ours, theirs = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "vmfork", "--root", str(guest.root), *arguments],
            env=environment() | {"TERM": "xterm", "COLUMNS": "80"} | more,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
        )
        os.close(theirs)
        self.written = ""

    def until(self, text: str) -> None:
        """Read until this was written."""
        end = time.monotonic() + PATIENCE_SEC
        while text not in self.written:
            assert select.select([self._ours], [], [], max(0, end - time.monotonic()))[0], self.written
            self.written += os.read(self._ours, 65536).decode()

    def code(self) -> int:
        """Its exit code, when all that it wrote was read."""
        try:
            while piece := os.read(self._ours, 65536):
                self.written += piece.decode()
        except OSError:
            pass
        os.close(self._ours)
        return self.process.wait(PATIENCE_SEC)


@pytest.mark.parametrize("verb", ["rotate", "trigger"])
def test_a_person_at_a_terminal_sees_each_hook_when_it_ends(
    guest: FakeGuest, daemon: RunningDaemon, tmp_path: Path, verb: str
) -> None:
    go = tmp_path / "go"
    write_hook(guest, "10-first", "exit 0")
    write_hook(guest, "20-second", f"until [ -e {go} ]; do sleep 0.05; done; exit 3")
    watched = Watched(guest, verb, NO_COLOR="1")
    watched.until("10-first")
    assert "20-second" not in watched.written
    assert daemon.status()["state"] == "reacting"
    go.touch()
    assert watched.code() == (1 if verb == "rotate" else 0)
    assert f"identity: {'rotate' if verb == 'rotate' else 'keep'}" in watched.written
    shown = re.findall(r"(\d\d-\w+) +(ok|failed)", watched.written)
    assert shown == [("10-first", "ok"), ("20-second", "failed")], watched.written


def test_a_newer_fork_is_followed_in_the_place_of_the_triggered_one(
    guest: FakeGuest, daemon: RunningDaemon, tmp_path: Path
) -> None:
    go = tmp_path / "go"
    write_hook(guest, "10-first", "exit 0")
    write_hook(guest, "20-second", f"until [ -e {go} ]; do sleep 0.05; done")
    watched = Watched(guest, "rotate", NO_COLOR="1")
    watched.until("10-first")
    guest.fork(os.urandom(16))
    watched.until("superseded by generation 3, identity: rotate")
    watched.until("10-first")
    go.touch()
    assert watched.code() == 0
    first, second = watched.written.split("superseded by ")
    assert "20-second" not in first
    assert ("10-first" in second, "20-second" in second) == (True, True)
    assert "settled" in second
