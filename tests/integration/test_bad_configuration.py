# SPDX-License-Identifier: Apache-2.0
"""Whatever stands in the place of the configuration: vmforkd runs, and says what is wrong and where."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support.fakeguest import FakeGuest
from support.runningdaemon import RunningDaemon, environment, eventually
from support.tools import need, need_ptrace, need_root
from torture.injection import Attached, Injection, strace, strace_of


def unreadable(path: Path) -> None:
    # A link to itself: root may read everything else.
    path.symlink_to(path.name)


def directory(path: Path) -> None:
    path.mkdir()


def text(content: str | bytes, mode: int = 0o644) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        path.chmod(mode)

    return write


def of_somebody_else(path: Path) -> None:
    text("[React]\nIdentity=rotate\n")(path)
    os.chown(path, 65534, 65534)


# How the file is broken, and what the complaint about it says after the file's name.
BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "unknown key": (text("[React]\nIdentities=rotate\n"), ":2: unknown key Identities="),
    "unknown key of a hook": (text("[Hook 15-clock]\nThreshold=1\n"), ":2: unknown key Threshold="),
    "unknown section": (text("[Reakt]\nIdentity=rotate\n"), ":2: unknown section [Reakt], Identity="),
    "wrong value": (text("# who\n\n[React]\nIdentity=maybe\n"), ":4: Identity= must be one of"),
    "wrong value of a hook": (text("[Hook 15-clock]\nThresholdMs=-3\n"), ":2: ThresholdMs= must be"),
    "no key": (text("[React]\nIdentity rotate\n"), ":2: neither a section nor Key=value"),
    "no section": (text("Identity=rotate\n"), ":1: Identity= stands before the first section"),
    "unreadable": (unreadable, ": "),
    "directory": (directory, ": is not a regular file"),
    "binary garbage": (text(bytes(range(256)) * 16), ": is not a text file in UTF-8"),
    "zeros": (text("[React]\nIdentity=rotate\n" + "\0" * 4096), ":3: neither a section nor Key=value"),
    "huge": (text("[React]\nIdentity=rotate\n" + "#" * (2 << 20)), ": is larger than"),
    "writable by others": (text("[React]\nIdentity=rotate\n", 0o666), ": is not trusted: "),
    "of somebody else": (of_somebody_else, ": is not trusted: "),
    "fifo": (lambda path: os.mkfifo(path), ": is not a regular file"),
}
# What is read up to the broken line holds.
READ_BEFORE = ("zeros",)


def place(guest: FakeGuest, where: str) -> Path:
    path = Path(guest.paths.config_etc, where)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


@pytest.mark.parametrize("how", BROKEN)
@pytest.mark.parametrize("where", ["vmfork.conf", "vmfork.conf.d/50-mine.conf"])
def test_the_daemon_runs_with_defaults_and_says_why(
    guest: FakeGuest, how: str, where: str, capfd: pytest.CaptureFixture[str]
) -> None:
    if how == "of somebody else" and os.geteuid() != 0:
        pytest.skip("needs root")
    make, complaint = BROKEN[how]
    path = place(guest, where)
    make(path)
    with RunningDaemon(guest) as daemon:
        status, doctor, shown = daemon.status(), daemon.ctl("doctor", "--json=short"), daemon.ctl("cat-config")
        guest.fork(os.urandom(16))
        event = daemon.settled(2)
    log = capfd.readouterr().err
    expected = f"{path}{complaint}"
    assert any(problem.startswith(expected) for problem in status["problems"]), status["problems"]
    assert f"vmforkd: WARNING: {expected}" in log
    assert doctor.returncode == 1
    assert any(problem.startswith(expected) for problem in json.loads(doctor.stdout)["problems"])
    assert (shown.returncode, f"vmforkctl: {expected}" in shown.stderr) == (1, True)
    assert event["identity"]["policy"] == ("rotate" if how in READ_BEFORE else "keep")


def test_a_file_that_may_not_be_read_is_reported(guest: FakeGuest) -> None:
    need_root()
    path = place(guest, "vmfork.conf")
    text("[React]\nIdentity=rotate\n", 0)(path)
    # The daemon's sandbox has no capability that would open it all the same.
    setpriv = [need("setpriv", package="util-linux"), "--bounding-set=-dac_override,-dac_read_search"]
    run = subprocess.run(
        [*setpriv, sys.executable, "-m", "vmfork", "--root", str(guest.root), "cat-config"],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (run.returncode, run.stderr) == (1, f"vmforkctl: {path}: cannot be read: Permission denied\n")
    assert "Identity=auto\n" in run.stdout


def test_the_rest_of_a_broken_file_holds(guest: FakeGuest) -> None:
    text("[React]\nTimeoutSec=never\nIdentity=rotate\n")(place(guest, "vmfork.conf"))
    with RunningDaemon(guest) as daemon:
        assert daemon.status()["identity"]["policy"] == "rotate"


def test_other_files_beside_a_broken_one_hold(guest: FakeGuest) -> None:
    place(guest, "vmfork.conf").write_bytes(b"\xff\x00")
    text("[React]\nIdentity=rotate\n")(place(guest, "vmfork.conf.d/10-good.conf"))
    directory(place(guest, "vmfork.conf.d/20-directory.conf"))
    with RunningDaemon(guest) as daemon:
        assert daemon.status()["identity"]["policy"] == "rotate"
        assert len(daemon.status()["problems"]) == 2


def test_a_file_in_the_place_of_the_directories_is_no_end(guest: FakeGuest) -> None:
    guest.put(guest.paths.config_etc, b"not a directory")
    with RunningDaemon(guest) as daemon:
        assert daemon.status()["detection"] == "event"


def settings_shown(run: subprocess.CompletedProcess[str]) -> dict[tuple[str, str], tuple[str, str | None]]:
    rows: list[dict[str, Any]] = json.loads(run.stdout)
    return {(row["section"], row["key"]): (row["value"], row["origin"]) for row in rows}


def test_cat_config_says_where_each_value_came_from(guest: FakeGuest) -> None:
    main, drop_in = place(guest, "vmfork.conf"), place(guest, "vmfork.conf.d/50-mine.conf")
    text("[React]\nIdentity=keep\nTimeoutSec=5\n[Hook 90-mine]\nEnable=no\n")(main)
    text("[Detect]\n\nPollIntervalSec=2\n[React]\nTimeoutSec=7\nSpreadSec=often\n")(drop_in)
    with RunningDaemon(guest) as daemon:
        shown = settings_shown(daemon.ctl("cat-config", "--json=short"))
        lines = daemon.ctl("cat-config").stdout.splitlines()
    assert shown["React", "Identity"] == ("keep", f"{main}:2")
    assert shown["React", "TimeoutSec"] == ("7", f"{drop_in}:5")
    assert shown["Detect", "PollIntervalSec"] == ("2", f"{drop_in}:3")
    assert shown["Hook 90-mine", "Enable"] == ("no", f"{main}:5")
    assert shown["React", "SpreadSec"] == ("0", None)
    assert shown["React", "Template"] == ("no", None)
    at = lines.index("TimeoutSec=7")
    assert lines[at - 1] == f"# {drop_in}:5"
    assert lines[lines.index("Template=no") - 1] == "# default"


def test_what_cat_config_prints_is_a_configuration_that_says_the_same(guest: FakeGuest) -> None:
    text("[React]\nIdentity=keep\n[Hook 30-hostname]\nTemplate=vm-%8t\n")(place(guest, "vmfork.conf"))
    with RunningDaemon(guest) as daemon:
        before = settings_shown(daemon.ctl("cat-config", "--json=short"))
        printed = daemon.ctl("cat-config").stdout
        text(printed)(place(guest, "vmfork.conf"))
        run = daemon.ctl("cat-config", "--json=short")
    assert run.returncode == 0, run.stderr
    assert {key: value for key, (value, _) in settings_shown(run).items()} == {
        key: value for key, (value, _) in before.items()
    }


@pytest.mark.parametrize("where", ["vmfork.conf", "vmfork.conf.d"])
def test_what_a_disk_does_not_show_at_a_reload_still_holds(guest: FakeGuest, where: str) -> None:
    need_ptrace()
    path = place(guest, "vmfork.conf" if where == "vmfork.conf" else "vmfork.conf.d/50-mine.conf")
    text("[React]\nIdentity=rotate\n")(path)
    with RunningDaemon(guest) as daemon:
        fault = strace_of(daemon.pid, ["openat"], "error=EIO", [str(place(guest, where))])
        with Attached(fault):
            refused = daemon.ctl("reload")
            policy = daemon.status()["identity"]["policy"]
            text("[React]\nIdentity=keep\n")(path)
        assert "Input/output error" in refused.stderr
        assert policy == "rotate"
        # Nobody asks for it: it is looked at again.
        eventually(lambda: daemon.status()["identity"]["policy"] == "keep")
        assert daemon.status()["problems"] == []


def test_what_a_disk_does_not_show_at_the_start_is_read_as_soon_as_it_does(guest: FakeGuest) -> None:
    need_ptrace()
    path = place(guest, "vmfork.conf")
    text("[React]\nIdentity=rotate\n")(path)
    # One reading is five tries.
    launcher = strace(injections=[Injection(call="openat", when="1..5", fault="error=EIO", path=str(path))])
    with RunningDaemon(guest, launcher=launcher) as daemon:
        eventually(lambda: daemon.status()["identity"]["policy"] == "rotate")
        assert daemon.status()["problems"] == []
