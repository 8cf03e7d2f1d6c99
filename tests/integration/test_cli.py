# SPDX-License-Identifier: Apache-2.0
"""vmforkctl as people meet it: in 80 columns, in a pipe, on a terminal, interrupted, and when something went wrong."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from support.fakeguest import FakeGuest
from support.runningdaemon import PATIENCE_SEC, RunningDaemon, environment, eventually, vmforkctl, write_hook
from vmfork.cli import VERBS

LONG = "30-a-hook-of-somebody-who-likes-to-explain-in-its-name-what-it-does"
VIEWS = ("status", "list", "doctor", "sources", "hooks", "plan", "actions", "rotate", "prepare", "resume")


def command(guest: FakeGuest, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "vmfork", "--root", str(guest.root), *arguments]


def in_shell(guest: FakeGuest, line: str) -> subprocess.CompletedProcess[str]:
    """A line of a shell, in which `vmforkctl` is this guest's."""
    define = f'vmforkctl() {{ "{sys.executable}" -m vmfork --root "{guest.root}" "$@"; }}'
    return subprocess.run(
        ["bash", "-c", f"{define}; {line}"],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def on_terminal(guest: FakeGuest, *arguments: str, **more: str) -> str:
    """What it writes to a terminal of 80 columns."""
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        command(guest, *arguments),
        env=environment() | {"TERM": "xterm", "COLUMNS": "80"} | more,
        stdin=theirs,
        stdout=theirs,
        stderr=subprocess.DEVNULL,
    ) as process:
        os.close(theirs)
        written = b""
        while True:
            try:
                piece = os.read(ours, 65536)
            except OSError:
                break
            if not piece:
                break
            written += piece
        process.wait(PATIENCE_SEC)
    os.close(ours)
    return written.decode()


def busy(guest: FakeGuest, daemon: RunningDaemon) -> None:
    """Long names, long edges, failures and problems everywhere."""
    write_hook(guest, LONG, "exit 3")
    write_hook(guest, "40-short", "exit 0")
    write_hook(guest, "a name that is no name of a hook at all and that is much longer than it should be", "exit 0")
    guest.set_vmclock(counter=1)
    guest.put(guest.paths.config_etc + "/vmfork.conf", b"[Detect]\nPollIntervalSec=never\n[Nothing]\nOf=it\n")
    daemon.ctl("reload")
    guest.set_vmclock(counter=2, seq=4)
    guest.fork(os.urandom(16))
    daemon.settled(2)


def test_every_view_fits_80_columns(guest: FakeGuest, daemon: RunningDaemon) -> None:
    busy(guest, daemon)
    # Paths are shown whole, and those below a tester's root are as long as they are.
    for view in VIEWS:
        wide = [line for line in daemon.ctl(view).stdout.splitlines() if len(line) > 80]
        assert wide == [], view


def test_the_list_names_each_failed_hook_and_how_it_ended(guest: FakeGuest, daemon: RunningDaemon) -> None:
    write_hook(guest, "10-fine", "exit 0")
    write_hook(guest, "20-bad", "exit 3")
    write_hook(guest, "30-worse", "kill -9 $$")
    guest.fork(os.urandom(16))
    daemon.settled(2)
    heading, row, *notes = daemon.ctl("list").stdout.splitlines()
    assert heading.split() == ["GEN", "WHEN", "KIND", "EDGES", "LATENCY", "IDENTITY", "RESULT"]
    assert row.endswith("failed, 1 ok")
    assert [note.strip() for note in notes] == ["20-bad failed (exit code 3)", "30-worse failed (signal 9)"]


def test_names_of_hooks_stay_whole_where_they_fit(guest: FakeGuest, daemon: RunningDaemon) -> None:
    busy(guest, daemon)
    assert "40-short" in daemon.ctl("hooks").stdout
    assert LONG in daemon.ctl("list").stdout


def test_a_pipe_gets_no_colour_and_a_terminal_does(guest: FakeGuest, daemon: RunningDaemon) -> None:
    busy(guest, daemon)
    for view in ("status", "list", "doctor"):
        assert "\x1b" not in daemon.ctl(view).stdout
        assert "\x1b[31m" in on_terminal(guest, view)


@pytest.mark.parametrize("variable", [{"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_no_colour_where_it_is_not_wanted(guest: FakeGuest, daemon: RunningDaemon, variable: dict[str, str]) -> None:
    busy(guest, daemon)
    assert "\x1b" not in on_terminal(guest, "list", **variable)


def test_colour_does_not_disturb_the_columns(guest: FakeGuest, daemon: RunningDaemon) -> None:
    busy(guest, daemon)
    for view in VIEWS[:7]:
        plain = daemon.ctl(view).stdout.splitlines()
        coloured = re.sub(r"\x1b\[[0-9]*m", "", on_terminal(guest, view)).splitlines()
        assert [line.rstrip() for line in coloured] == [line.rstrip() for line in plain], view


def test_json_is_pretty_on_a_terminal_and_one_line_elsewhere(guest: FakeGuest, daemon: RunningDaemon) -> None:
    assert daemon.ctl("status", "-j").stdout.count("\n") == 1
    assert on_terminal(guest, "status", "-j").count("\n") > 5
    assert on_terminal(guest, "status", "--json=short").count("\n") == 1


@pytest.mark.parametrize("view", ["status", "list", "doctor", "sources", "hooks", "plan", "actions", "cat-config"])
def test_every_view_has_the_same_content_in_both_kinds_of_json_and_none_when_it_is_off(
    guest: FakeGuest, daemon: RunningDaemon, view: str
) -> None:
    write_hook(guest, "10-mine", "exit 0")
    guest.fork(os.urandom(16))
    daemon.settled(2)
    pretty, short, off, plain = (
        daemon.ctl(view, *options).stdout for options in (("--json=pretty",), ("--json=short",), ("--json=off",), ())
    )
    assert (short.count("\n"), pretty.count("\n") > 3) == (1, True)
    assert json.loads(pretty) == json.loads(short)
    assert off.splitlines()[0] == plain.splitlines()[0]
    with pytest.raises(ValueError, match="Expecting value"):
        json.loads(off)


def test_no_legend_leaves_only_the_rows(guest: FakeGuest, daemon: RunningDaemon) -> None:
    guest.fork(os.urandom(16))
    daemon.settled(2)
    run = daemon.ctl("list", "--no-legend")
    assert [line.split()[0] for line in run.stdout.splitlines()] == ["2"]
    assert run.stderr == ""


@pytest.mark.parametrize("verb", ["trigger", "prepare", "resume", "rotate", "reload", "status"])
def test_quiet_says_nothing_where_all_is_well(daemon: RunningDaemon, verb: str) -> None:
    run = daemon.ctl(verb, "-q")
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


@pytest.mark.parametrize("verb", ["rotate", "prepare", "resume"])
def test_quiet_still_names_what_failed(guest: FakeGuest, daemon: RunningDaemon, verb: str) -> None:
    write_hook(guest, "10-bad", "exit 1")
    if verb == "resume":
        daemon.ctl("prepare", "-q")
    run = daemon.ctl(verb, "-q")
    assert (run.returncode, run.stdout) == (1, "")
    assert "vmforkctl: 10-bad: failed" in run.stderr
    assert "hint: " in run.stderr


def test_a_reader_that_leaves_early_is_no_error(guest: FakeGuest, daemon: RunningDaemon) -> None:
    guest.fork(os.urandom(16))
    daemon.settled(2)
    for view in ("list", "actions", "cat-config", "status --json=pretty"):
        run = in_shell(guest, f"vmforkctl {view} | head -1; exit 0")
        assert (run.stdout.count("\n"), run.stderr) == (1, ""), view
        assert in_shell(guest, f"vmforkctl {view} | true; exit 0").stderr == "", view


def test_a_full_disk_is_said_once_and_fails(guest: FakeGuest, daemon: RunningDaemon) -> None:
    run = in_shell(guest, "vmforkctl actions > /dev/full")
    assert (run.returncode, run.stderr) == (1, "vmforkctl: actions: No space left on device\n")


def test_a_closed_standard_output_is_no_traceback(guest: FakeGuest, daemon: RunningDaemon) -> None:
    for view in VIEWS:
        assert "Traceback" not in in_shell(guest, f"vmforkctl {view} >&-").stderr, view
        assert "Traceback" not in in_shell(guest, f"vmforkctl {view} 2>&- >&-; echo $? >&2").stderr, view


def test_an_interrupt_is_quiet(guest: FakeGuest, daemon: RunningDaemon) -> None:
    before = descriptors_of(daemon)
    with subprocess.Popen(
        command(guest, "wait"), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        eventually(lambda: descriptors_of(daemon) > before)
        process.send_signal(signal.SIGINT)
        output, complaint = process.communicate(timeout=PATIENCE_SEC)
    assert process.returncode in (-signal.SIGINT, 128 + signal.SIGINT)
    assert (output, complaint) == ("", "")


def descriptors_of(daemon: RunningDaemon) -> int:
    return len(os.listdir(f"/proc/{daemon.pid}/fd"))


def test_an_interrupt_while_modules_are_loaded_is_quiet(tmp_path: Path) -> None:
    (tmp_path / "argparse.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGINT)")
    with_ours = environment() | {"PYTHONPATH": f"{tmp_path}:{environment()['PYTHONPATH']}"}
    run = subprocess.run(
        [sys.executable, "-m", "vmfork", "status"], env=with_ours, capture_output=True, timeout=60, check=False
    )
    assert (run.returncode, run.stderr) == (-signal.SIGINT, b"")


@pytest.mark.parametrize(
    ("arguments", "code"),
    [(("status",), 3), (("trigger",), 3), (("reload",), 3), (("wait", "--timeout", "1"), 3), (("prepare",), 3)],
)
def test_an_error_is_on_stderr_with_a_hint(guest: FakeGuest, arguments: tuple[str, ...], code: int) -> None:
    run = vmforkctl(guest, *arguments)
    assert run.returncode == code
    assert run.stderr.startswith("vmforkctl: ")
    assert "\nhint: " in run.stderr


@pytest.mark.parametrize("arguments", [("frob",), ("list", "-n", "x"), ("--json=xml",), ("wait", "--timeout", "-1")])
def test_a_wrong_command_line_exits_2(guest: FakeGuest, arguments: tuple[str, ...]) -> None:
    run = vmforkctl(guest, *arguments)
    assert (run.returncode, run.stdout) == (2, "")
    assert "usage: vmforkctl" in run.stderr


def test_names_of_files_cannot_steer_the_terminal(guest: FakeGuest, daemon: RunningDaemon) -> None:
    directory = Path(guest.paths.hooks_etc)
    directory.mkdir(parents=True, exist_ok=True)
    for name in (b"10-\x1b[2J", b"20-\xff\xfe", b"30-two\nlines", "40-ümlaut".encode()):
        Path(os.fsdecode(os.fsencode(directory) + b"/" + name)).write_bytes(b"#!/bin/sh\n")
    for view in ("hooks", "plan"):
        for run in (daemon.ctl(view), vmforkctl(guest, view, "--json=pretty")):
            assert run.returncode == 0, run.stderr
            assert "\x1b" not in run.stdout
    assert len(json.loads(daemon.ctl("hooks", "--json=short").stdout)) == 4


@pytest.mark.parametrize("verb", [verb.name for verb in VERBS])
def test_every_verb_has_help_in_80_columns(guest: FakeGuest, verb: str) -> None:
    run = vmforkctl(guest, verb, "--help")
    assert run.returncode == 0
    assert max(map(len, run.stdout.splitlines())) <= 80


def test_nobody_is_left_without_an_answer_when_the_daemon_dies(guest: FakeGuest, daemon: RunningDaemon) -> None:
    before = descriptors_of(daemon)
    waiting = subprocess.Popen(command(guest, "wait", "--timeout", "3"), env=environment(), stderr=subprocess.PIPE)
    eventually(lambda: descriptors_of(daemon) > before)
    daemon.kill()
    # Not running, to who had not yet heard from it; otherwise it might come back in time.
    assert waiting.wait(PATIENCE_SEC) in (3, 124)
    waiting.communicate()
