# SPDX-License-Identifier: Apache-2.0
"""What was prepared for a snapshot is undone, once, whatever happens to the daemon and whoever asks meanwhile."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from support.fakeguest import FakeGuest
from support.runningdaemon import PATIENCE_SEC, RunningDaemon, environment, eventually, write_hook
from vmfork.jsonfields import JsonObject
from vmfork.varlink.client import Client

# One line for each run, in two parts; after a snapshot it waits between them until it may go on.
HOOK = """echo "$1" >>"$VMFORK_ROOT/ran"
while [ "$1" = after-snapshot ] && [ -e "$VMFORK_ROOT/wait" ]; do sleep 0.02; done
echo "end-$1" >>"$VMFORK_ROOT/ran\""""
PREPARED = ["before-snapshot", "end-before-snapshot"]
UNDONE = ["after-snapshot", "end-after-snapshot"]


@pytest.fixture
def guest(guest: FakeGuest) -> FakeGuest:
    write_hook(guest, "10-a", HOOK)
    guest.put(guest.paths.config_etc + "/vmfork.conf", b"[React]\nAckTimeoutSec=100ms\n")
    return guest


def ran(guest: FakeGuest) -> list[str]:
    path = guest.root / "ran"
    return path.read_text().split() if path.exists() else []


def nothing_is_prepared(daemon: RunningDaemon) -> bool:
    return daemon.ctl("resume").stderr == "nothing was prepared\n"


def marks(guest: FakeGuest) -> list[str]:
    return [path for path in (guest.paths.template_mark, guest.paths.template_mark_run) if os.path.lexists(path)]


@contextmanager
def running(guest: FakeGuest, verb: str) -> Iterator[subprocess.Popen[str]]:
    """vmforkctl, which has not ended yet."""
    command = [sys.executable, "-m", "vmfork", "--root", str(guest.root), verb]
    with subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


@contextmanager
def straggler(guest: FakeGuest) -> Iterator[Iterator[JsonObject]]:
    """The notices of a tracked subscriber that never acknowledges one, which may take a day."""
    guest.put(guest.paths.config_etc + "/vmfork.conf", b"[React]\nAckTimeoutSec=1h\n")
    with RunningDaemon(guest), Client.connect(guest.paths.public_socket, timeout=PATIENCE_SEC) as client:
        notices = client.stream("io.vmfork.Subscribe", {"track": True})
        assert next(notices)["notice"] == "hello"
        yield notices


@pytest.mark.parametrize("end", ["kill", "stop"])
def test_resume_undoes_what_an_earlier_daemon_prepared(guest: FakeGuest, end: str) -> None:
    with RunningDaemon(guest) as daemon:
        assert daemon.ctl("prepare", "--template").returncode == 0
        getattr(daemon, end)()
        daemon.start()
        assert ran(guest) == PREPARED
        assert daemon.ctl("resume").returncode == 0
        assert ran(guest) == [*PREPARED, *UNDONE]
        assert marks(guest) == []
        assert nothing_is_prepared(daemon)


def test_the_deadline_outlives_the_daemon_that_set_it(guest: FakeGuest) -> None:
    with RunningDaemon(guest) as daemon:
        assert daemon.ctl("prepare", "--template", "--deadline", "1").returncode == 0
        daemon.kill()
        daemon.start()
        eventually(lambda: ran(guest) == [*PREPARED, *UNDONE])
        eventually(lambda: nothing_is_prepared(daemon))
        assert marks(guest) == []


def test_an_undoing_that_was_cut_off_is_begun_again(guest: FakeGuest) -> None:
    (guest.root / "wait").touch()
    with RunningDaemon(guest) as daemon:
        assert daemon.ctl("prepare").returncode == 0
        with running(guest, "resume"):
            eventually(lambda: ran(guest) == [*PREPARED, "after-snapshot"])
            daemon.kill()
        daemon.start()
        (guest.root / "wait").unlink()
        eventually(lambda: ran(guest)[-1] == "end-after-snapshot")
        eventually(lambda: nothing_is_prepared(daemon))


def test_who_asks_for_what_is_being_undone_already_is_answered_at_its_end(guest: FakeGuest) -> None:
    (guest.root / "wait").touch()
    with RunningDaemon(guest) as daemon:
        assert daemon.ctl("prepare").returncode == 0
        with running(guest, "resume") as first, Client.connect(guest.paths.admin_socket) as second:
            eventually(lambda: "after-snapshot" in ran(guest))
            second.send("io.vmfork.Resume", {})
            # Answered after it was taken up.
            assert daemon.status()["generation"] == 1
            (guest.root / "wait").unlink()
            assert first.wait(PATIENCE_SEC) == 0
            assert "hooks" in str(eventually(second.receive))
        assert ran(guest).count("after-snapshot") == 1


def test_a_fork_ends_the_preparation_although_nobody_watched(guest: FakeGuest) -> None:
    with RunningDaemon(guest) as daemon:
        assert daemon.ctl("prepare", "--template").returncode == 0
        daemon.kill()
        guest.fork(os.urandom(16))
        daemon.start()
        assert daemon.settled(2)["identity"]["policy"] == "rotate"
        assert nothing_is_prepared(daemon)
        assert ran(guest) == [*PREPARED, "after-fork", "end-after-fork"]


def test_snapshots_are_counted_on_after_a_restart(guest: FakeGuest) -> None:
    with RunningDaemon(guest) as daemon:
        assert daemon.ctl("prepare").returncode == 0
        assert daemon.ctl("resume").returncode == 0
        daemon.kill()
        daemon.start()
        assert '"snapshot":2' in daemon.ctl("prepare", "--json=short").stdout.replace(" ", "")


def test_preparing_again_sets_the_deadline_anew(guest: FakeGuest) -> None:
    with RunningDaemon(guest) as daemon:
        assert daemon.ctl("prepare", "--deadline", "1").returncode == 0
        began = time.monotonic()
        # Where the machine is so busy that the first is being undone just now, it is refused once.
        eventually(lambda: daemon.ctl("prepare", "--deadline", "3").returncode == 0)
        already = ran(guest).count("end-after-snapshot")
        eventually(lambda: ran(guest).count("end-after-snapshot") > already)
        assert time.monotonic() - began >= 3


def test_resume_while_subscribers_are_waited_for_ends_prepare(guest: FakeGuest) -> None:
    with straggler(guest) as notices, running(guest, "prepare") as prepare:
        assert next(notices)["notice"] == "before-snapshot"
        with running(guest, "resume") as resume:
            assert resume.wait(PATIENCE_SEC) == 0
        _, complaint = prepare.communicate(timeout=PATIENCE_SEC)
        assert (prepare.returncode, complaint.startswith("vmforkctl: not prepared: ")) == (1, True)
        assert ran(guest) == UNDONE


def test_one_snapshot_is_prepared_at_a_time(guest: FakeGuest) -> None:
    with straggler(guest) as notices, running(guest, "prepare") as first:
        assert next(notices)["notice"] == "before-snapshot"
        with running(guest, "prepare") as second:
            _, complaint = second.communicate(timeout=PATIENCE_SEC)
        assert (second.returncode, "another snapshot is being prepared" in complaint) == (1, True)
        assert first.poll() is None


def test_a_fork_that_is_not_settled_cannot_use_up_a_new_mark(guest: FakeGuest) -> None:
    Path(guest.paths.template_mark).touch()
    with straggler(guest) as notices:
        guest.fork(os.urandom(16))
        assert next(notices)["notice"] == "fork"
        eventually(lambda: "end-after-fork" in ran(guest))
        with running(guest, "prepare") as prepare:
            _, complaint = prepare.communicate(timeout=PATIENCE_SEC)
        assert (prepare.returncode, "a reaction is still going on" in complaint) == (1, True)


def test_a_deadline_of_a_broken_clock_keeps_nobody_from_starting(guest: FakeGuest) -> None:
    memory = Path(guest.paths.detector_memory)
    with RunningDaemon(guest) as daemon:
        assert daemon.ctl("prepare").returncode == 0
        daemon.stop()
        remembered = json.loads(memory.read_text())
        remembered["preparation"]["undo_at_ns"] = 2**64 - 1
        memory.write_text(json.dumps(remembered))
        daemon.start()
        assert daemon.ctl("resume").returncode == 0
        assert ran(guest) == [*PREPARED, *UNDONE]
