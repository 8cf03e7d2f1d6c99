# SPDX-License-Identifier: Apache-2.0
"""Hooks that somebody else planted, and hooks that misbehave: each is bounded, and the others still run."""

from __future__ import annotations

import logging
import os
import resource
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.hooks import QUICK, Guest, Recorder, alive, pids_in, run
from support.tools import need_root
from vmfork.model import EventState, HookOutcome
from vmfork.reactor.process import Limits

USER = 12345
PATIENT = Limits(timeout_sec=30, kill_after_sec=0.5, retry_pause_sec=0.02)


@pytest.fixture
def guest(tmp_path: Path) -> Iterator[Guest]:
    """A guest with a good hook before, beside and after the hostile one; nothing may outlive the test."""
    guest = Guest(tmp_path)
    for name in ("05-before", "50-beside", "90-after"):
        guest.hook(name, f"echo {name} >> {tmp_path}/good", directory=guest.lib)
    yield guest
    for pid in pids_in(tmp_path / "pids"):
        if alive(pid):
            os.kill(pid, signal.SIGKILL)


def others_ran(guest: Guest, seen: Recorder) -> bool:
    good = ["05-before", "50-beside", "90-after"]
    return (guest.root / "good").read_text().split() == good and all(
        seen.outcomes()[name] is HookOutcome.OK for name in good
    )


def refused(guest: Guest, name: str = "50-hostile") -> None:
    seen = run(guest, limits=PATIENT)
    assert seen.outcomes()[name] is HookOutcome.UNTRUSTED
    assert not (guest.root / "ran").exists()
    assert seen.state is EventState.FAILED
    assert others_ran(guest, seen)


def test_a_world_writable_file_is_not_run(guest: Guest) -> None:
    guest.hook("50-hostile", f"touch {guest.root}/ran", mode=0o757)
    refused(guest)


def test_a_hook_in_a_world_writable_directory_is_not_run(guest: Guest) -> None:
    guest.hook("50-hostile", f"touch {guest.root}/ran")
    guest.etc.chmod(0o777)
    refused(guest)


def test_nobody_masks_a_hook_through_a_world_writable_directory(guest: Guest) -> None:
    (guest.etc / "50-beside").touch()
    guest.etc.chmod(0o777)
    assert others_ran(guest, run(guest, limits=PATIENT))


def test_a_link_to_a_users_file_is_not_followed(guest: Guest) -> None:
    need_root()
    script = guest.root / "script"
    script.write_text(f"#!/bin/sh\ntouch {guest.root}/ran\n")
    script.chmod(0o755)
    os.chown(script, USER, USER)
    (guest.etc / "50-hostile").symlink_to("/script")
    refused(guest)


def test_a_link_into_a_users_directory_is_not_followed(guest: Guest) -> None:
    need_root()
    home = guest.root / "home"
    home.mkdir()
    guest.hook("script", f"touch {guest.root}/ran", directory=home)
    os.chown(home, USER, USER)
    (guest.etc / "50-hostile").symlink_to("/home/script")
    refused(guest)


def test_a_writable_parent_of_the_directory_spoils_it(guest: Guest) -> None:
    guest.hook("50-hostile", f"touch {guest.root}/ran")
    guest.etc.parent.chmod(0o775)
    refused(guest)


@pytest.mark.parametrize("mode", [0o4755, 0o2755])
def test_a_setuid_hook_is_not_run(guest: Guest, mode: int) -> None:
    guest.hook("50-hostile", f"touch {guest.root}/ran", mode=mode)
    refused(guest)


DAEMONISE = """
import os, signal, time
def note():
    with open("{root}/pids", "a") as file:
        file.write(f"{{os.getpid()}}\\n")
"""


def ended_wholly(guest: Guest, count: int, seen: Recorder, name: str) -> None:
    pids = pids_in(guest.root / "pids")
    assert len(pids) == count, "the hook did not do what it was made for"
    assert not [pid for pid in pids if alive(pid)]
    assert seen.outcomes()[name] is HookOutcome.TIMEOUT
    assert others_ran(guest, seen)


@pytest.mark.parametrize("closes", [False, True], ids=["keeps-its-pipe", "closes-its-pipe"])
def test_daemons_of_a_hook_that_times_out_end_with_it(guest: Guest, closes: bool) -> None:
    close = "os.closerange(0, 64)" if closes else "pass"
    guest.python_hook(
        "50-hostile",
        DAEMONISE.format(root=guest.root)
        + f"""
for signum in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
    signal.signal(signum, signal.SIG_IGN)
note()
for _ in range(5):
    if os.fork() == 0:
        os.setsid()
        if os.fork():
            os._exit(0)
        os.setsid()
        note()
        {close}
        while True:
            time.sleep(60)
while True:
    time.sleep(60)
""",
    )
    seen = run(guest, limits=Limits(timeout_sec=1.0, kill_after_sec=0.3))
    ended_wholly(guest, 6, seen, "50-hostile")


def test_a_daemon_that_hides_every_trace_ends_with_a_hook_that_runs_alone(guest: Guest) -> None:
    guest.python_hook(
        "60-hostile",
        DAEMONISE.format(root=guest.root)
        + """
import sys
note()
if os.fork() == 0:
    os.setsid()
    if os.fork():
        os._exit(0)
    os.setsid()
    note()
    os.closerange(0, 64)
    os.execve("/bin/sleep", ["sleep", "60"], {})
time.sleep(60)
""",
    )
    ended_wholly(guest, 2, run(guest, limits=Limits(timeout_sec=1.0, kill_after_sec=0.3)), "60-hostile")


def test_processes_that_keep_forking_are_all_ended(guest: Guest) -> None:
    guest.python_hook(
        "50-hostile",
        DAEMONISE.format(root=guest.root)
        + """
signal.signal(signal.SIGTERM, signal.SIG_IGN)
note()
end = time.monotonic() + 20
for _ in range(6):
    if os.fork() == 0:
        break
else:
    time.sleep(60)
# Bounded: a test that is cut off must not leave a machine full of processes.
while time.monotonic() < end:
    # Each generation lives for a moment only and leaves its successor behind as an orphan.
    if os.fork():
        time.sleep(0.3)
        os._exit(0)
    os.setsid()
    time.sleep(0.15)
""",
    )
    marker = f"VMFORK_ROOT={guest.root}".encode()
    seen = run(guest, limits=Limits(timeout_sec=0.8, kill_after_sec=0.2))
    assert seen.outcomes()["50-hostile"] is HookOutcome.TIMEOUT
    assert others_ran(guest, seen)
    left = [entry for entry in Path("/proc").iterdir() if entry.name.isdigit() and _carries(entry, marker)]
    assert left == []


def _carries(entry: Path, marker: bytes) -> bool:
    try:
        return marker in (entry / "environ").read_bytes().split(b"\0") and alive(int(entry.name))
    except OSError:
        return False


def test_a_hook_that_ignores_term_is_killed(guest: Guest) -> None:
    guest.hook("50-hostile", f"trap '' TERM; echo $$ > {guest.root}/pids; while :; do sleep 0.1; done")
    began = time.monotonic()
    ended_wholly(guest, 1, run(guest, limits=QUICK), "50-hostile")
    assert time.monotonic() - began < 5


def test_a_hook_that_stops_itself_is_killed(guest: Guest) -> None:
    guest.hook("50-hostile", f"echo $$ > {guest.root}/pids; kill -STOP $$")
    ended_wholly(guest, 1, run(guest, limits=QUICK), "50-hostile")


def test_a_flood_of_a_gibibyte_is_bounded_and_the_hook_goes_on(guest: Guest, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    guest.hook(
        "50-hostile",
        "head -c 1073741824 /dev/zero | tr '\\0' 'x'; yes flood | head -n 100000;"
        f"echo last words; touch {guest.root}/end",
    )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seen = run(guest, limits=PATIENT)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert seen.outcomes()["50-hostile"] is HookOutcome.OK
    assert (guest.root / "end").exists()
    assert others_ran(guest, seen)
    assert grown < 16 * 1024, "KiB more than before"
    said = [record.getMessage() for record in caplog.records if getattr(record, "VMFORK_HOOK", "") == "50-hostile"]
    assert sum(map(len, said)) < 512 * 1024
    assert "50-hostile: last words" in said
    assert any("more bytes of output were dropped" in line for line in said)


def test_a_flood_of_empty_lines_is_bounded_too(guest: Guest, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    guest.hook("50-hostile", "yes '' | head -n 1000000")
    seen = run(guest, limits=PATIENT)
    assert seen.outcomes()["50-hostile"] is HookOutcome.OK
    assert len(caplog.records) < 1200


def test_a_hook_that_closes_its_descriptors_is_still_waited_for(guest: Guest) -> None:
    guest.hook("50-hostile", f"exec 0<&- 1>&- 2>&-; sleep 0.2; touch {guest.root}/end; exit 3")
    seen = run(guest, limits=PATIENT)
    assert seen.results["50-hostile"].exit_code == 3
    assert (guest.root / "end").exists()
    assert others_ran(guest, seen)


def test_a_hook_that_never_ends_costs_its_time_out_only(guest: Guest) -> None:
    guest.hook("50-hostile", f"echo $$ > {guest.root}/pids; while :; do :; done")
    began = time.monotonic()
    ended_wholly(guest, 1, run(guest, limits=QUICK), "50-hostile")
    assert time.monotonic() - began < 5


def test_75_for_ever_is_tried_three_times(guest: Guest) -> None:
    guest.hook("50-hostile", f"echo x >> {guest.root}/tries; exit 75")
    seen = run(guest, limits=PATIENT)
    assert (guest.root / "tries").read_text() == "x\n" * 3
    result = seen.results["50-hostile"]
    assert (result.result, result.exit_code) == (HookOutcome.FAILED, 75)
    assert others_ran(guest, seen)


def test_hundreds_of_hooks_at_once_do_not_exhaust_the_descriptors(guest: Guest) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for number in range(300):
        guest.hook(f"60-many{number}", "exit 0")
    resource.setrlimit(resource.RLIMIT_NOFILE, (512, hard))
    try:
        seen = run(guest, limits=PATIENT)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert set(seen.outcomes().values()) == {HookOutcome.OK}
    assert len(seen.results) == 303
