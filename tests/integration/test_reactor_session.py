# SPDX-License-Identifier: Apache-2.0
"""The reactor as a process of its own against a real varlink server, killed and superseded at any instant."""

from __future__ import annotations

import errno
import os
import random
import signal
import stat
import subprocess
import sys
import time
from importlib.util import cache_from_source
from pathlib import Path

import pytest

from support.admindaemon import AdminDaemon, Work
from support.hooks import Guest, alive, event, pids_in
from support.tools import need, need_ptrace
from torture.injection import Injection, strace
from vmfork import actions
from vmfork.model import HookOutcome, HookResult

_REACT = """
import sys, logging
logging.basicConfig(level="INFO", stream=sys.stderr)
from vmfork.errors import VmforkError
from vmfork.paths import Paths
from vmfork.reactor.session import react
try:
    sys.exit(react(Paths(sys.argv[1]), parent=int(sys.argv[2]) if sys.argv[2:] else None))
except VmforkError as error:
    sys.exit(f"failed: {error}")
"""


@pytest.fixture
def guest(tmp_path: Path) -> Guest:
    return Guest(tmp_path)


def reactor(guest: Guest, *arguments: str, launcher: list[str] | None = None) -> subprocess.Popen[str]:
    command = [*(launcher or []), sys.executable, "-c", _REACT, str(guest.root), *arguments]
    environment = {**os.environ, "PYTHONPATH": ":".join(sys.path)}
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)


def end(process: subprocess.Popen[str], *, timeout: float = 20) -> tuple[int, str]:
    _, said = process.communicate(timeout=timeout)
    return process.returncode, said


def waits_for_a_lock(pid: int) -> bool:
    return any("->" in line and f" {pid} " in line for line in Path("/proc/locks").read_text().splitlines())


def until(condition: object, *, seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)


def test_nothing_to_do_ends_quietly(guest: Guest) -> None:
    with AdminDaemon(guest.paths, None):
        assert end(reactor(guest)) == (0, "")


def test_a_whole_reaction_is_reported(guest: Guest) -> None:
    guest.hook("10-fine", "exit 0")
    guest.hook("20-skips", "exit 77")
    (guest.etc / "30-masked").symlink_to("/dev/null")
    with AdminDaemon(guest.paths, Work(token="t1")) as daemon:
        code, said = end(reactor(guest))
        assert (code, daemon.job) == (0, None), said
    (work,) = daemon.done
    assert {name: result.result.value for name, result in work.finished.items()} == {
        "10-fine": "ok",
        "20-skips": "skipped",
        "30-masked": "masked",
    }
    assert work.begun == ["10-fine", "20-skips"]
    assert (work.state, work.step) == ("settled", None)


def test_a_failed_hook_fails_the_reaction_and_the_exit_code(guest: Guest) -> None:
    guest.hook("10-fails", "exit 1")
    with AdminDaemon(guest.paths, Work(token="t1")) as daemon:
        assert end(reactor(guest))[0] == 1
    assert daemon.done[0].state == "failed"


def test_what_an_earlier_run_finished_is_not_run_again(guest: Guest, tmp_path: Path) -> None:
    for name in ("10-done", "20-broken"):
        guest.hook(name, f"echo {name} >> {tmp_path}/log")
    finished = {
        "10-done": HookResult(name="10-done", path="/x", result=HookOutcome.OK),
        "20-broken": HookResult(name="20-broken", path="/x", result=HookOutcome.INTERRUPTED),
    }
    with AdminDaemon(guest.paths, Work(token="t1", finished=finished)):
        end(reactor(guest))
    assert (tmp_path / "log").read_text() == "20-broken\n"


def test_before_a_snapshot_without_any_fork_hooks_run_backwards(guest: Guest, tmp_path: Path) -> None:
    for name in ("10-a", "20-b"):
        guest.hook(name, f'echo "$1 {name} ${{VMFORK_KIND-none}} $(cat)" >> {tmp_path}/log')
    with AdminDaemon(guest.paths, Work(token="s1", phase="before-snapshot", event=None)) as daemon:
        assert end(reactor(guest))[0] == 0
    assert (tmp_path / "log").read_text() == "before-snapshot 20-b none \nbefore-snapshot 10-a none \n"
    assert daemon.done[0].ok() == {"10-a", "20-b"}


def test_the_configuration_sets_time_outs_and_switches_off(guest: Guest, tmp_path: Path) -> None:
    guest.hook("10-slow.sh", "sleep 60")
    guest.hook("20-off", f"touch {tmp_path}/ran")
    (guest.root / "etc/vmfork/vmfork.conf").write_text("[Hook 10-slow]\nTimeoutSec=300ms\n[Hook 20-off]\nEnable=no\n")
    with AdminDaemon(guest.paths, Work(token="t1")) as daemon:
        end(reactor(guest))
    results = {name: result.result.value for name, result in daemon.done[0].finished.items()}
    assert results == {"10-slow.sh": "timeout", "20-off": "masked"}
    assert not (tmp_path / "ran").exists()


def test_a_newer_fork_ends_the_hooks_and_the_reactor(guest: Guest, tmp_path: Path) -> None:
    guest.hook("10-quick", f"until [ -s {tmp_path}/pids ]; do sleep 0.01; done")
    guest.hook("10-slow", f"echo $$ > {tmp_path}/pids; exec sleep 60")
    with AdminDaemon(guest.paths, Work(token="t1")) as daemon:

        def supersede(call: object) -> None:
            if (tmp_path / "pids").exists():
                daemon.job = Work(token="t2")

        daemon.before_answer = supersede
        code, said = end(reactor(guest))
    assert code == 0
    assert "superseded" in said
    assert daemon.done == []
    assert not [pid for pid in pids_in(tmp_path / "pids") if alive(pid)]


def test_sigterm_interrupts_and_reports(guest: Guest, tmp_path: Path) -> None:
    guest.hook("10-slow", f"echo $$ > {tmp_path}/pids; exec sleep 60")
    with AdminDaemon(guest.paths, Work(token="t1")) as daemon:
        process = reactor(guest)
        until(lambda: pids_in(tmp_path / "pids"))
        process.terminate()
        began = time.monotonic()
        assert end(process)[0] == 0
        assert time.monotonic() - began < 3
        assert daemon.job is not None
        assert daemon.job.finished["10-slow"].result is HookOutcome.INTERRUPTED
    assert not [pid for pid in pids_in(tmp_path / "pids") if alive(pid)]


def test_a_daemon_that_vanishes_ends_the_hooks(guest: Guest, tmp_path: Path) -> None:
    guest.hook("10-quick", f"until [ -s {tmp_path}/pids ]; do sleep 0.01; done")
    guest.hook("10-slow", f"echo $$ > {tmp_path}/pids; exec sleep 60")
    with AdminDaemon(guest.paths, Work(token="t1")) as daemon:

        def hang_up(call: object) -> None:
            if (tmp_path / "pids").exists():
                call.connection.close("the daemon dies")  # type: ignore[attr-defined]

        daemon.before_answer = hang_up
        code, said = end(reactor(guest))
    assert code == 1
    assert "failed: " in said
    assert not [pid for pid in pids_in(tmp_path / "pids") if alive(pid)]


def test_a_reactor_that_starts_before_the_daemon_waits_for_it(guest: Guest) -> None:
    guest.hook("10-fine", "exit 0")
    (guest.root / "run/vmforkd").mkdir(parents=True)
    process = reactor(guest)
    until(lambda: (guest.root / "run/vmforkd/react.hooks").exists())
    with AdminDaemon(guest.paths, Work(token="t1")) as daemon:
        assert end(process)[0] == 0
    assert daemon.done


def test_the_lock_and_the_ledger_are_roots_alone(guest: Guest) -> None:
    with AdminDaemon(guest.paths, None):
        end(reactor(guest))
    for path in (guest.paths.react_lock, guest.paths.react_hooks):
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o600


def test_a_second_reactor_waits_for_the_end_of_the_first(guest: Guest, tmp_path: Path) -> None:
    guest.hook("10-x", f"echo x >> {tmp_path}/log; until [ -e {tmp_path}/go ]; do sleep 0.01; done")
    with AdminDaemon(guest.paths, Work(token="t1")) as daemon:
        first = reactor(guest)
        until((tmp_path / "log").exists)
        second = reactor(guest)
        until(lambda: waits_for_a_lock(second.pid))
        assert daemon.calls == ["BeginReaction"]
        (tmp_path / "go").touch()
        assert end(first)[0] == 0
        assert end(second)[0] == 0
        assert daemon.calls == ["BeginReaction"] * 2
    assert (tmp_path / "log").read_text() == "x\n"


def test_a_reactor_dies_with_the_process_that_started_it(guest: Guest, tmp_path: Path) -> None:
    guest.hook("10-slow", f"echo $$ > {tmp_path}/pids; exec sleep 60")
    script = "import os, subprocess, sys; subprocess.Popen([*sys.argv[1:], str(os.getpid())]).wait()"
    with AdminDaemon(guest.paths, Work(token="t1")):
        process = reactor(guest, launcher=[sys.executable, "-c", script])
        until(lambda: pids_in(tmp_path / "pids"))
        process.kill()
        end(process)
        until(lambda: not [pid for pid in pids_in(tmp_path / "pids") if alive(pid)])


def test_a_new_reactor_ends_what_a_killed_one_left(guest: Guest, tmp_path: Path) -> None:
    guest.python_hook(
        "10-slow",
        f"""
        import os, time
        if os.path.exists("{tmp_path}/second"):
            raise SystemExit(0)
        for _ in range(2):
            if os.fork():
                break
            os.setsid()
        open("{tmp_path}/pids", "a").write(f"{{os.getpid()}}\\n")
        time.sleep(60)
        """,
    )
    with AdminDaemon(guest.paths, Work(token="t1")) as daemon:
        process = reactor(guest)
        until(lambda: len(pids_in(tmp_path / "pids")) == 3)
        process.kill()
        end(process)
        assert all(alive(pid) for pid in pids_in(tmp_path / "pids"))
        (tmp_path / "second").touch()
        assert end(reactor(guest))[0] == 0
        assert daemon.done[0].ok() == {"10-slow"}
    assert not [pid for pid in pids_in(tmp_path / "pids") if alive(pid)]


def test_a_new_reactor_leaves_the_hooks_of_another_vmfork_alone(guest: Guest, tmp_path: Path) -> None:
    # Around a snapshot a hook has no token: its name alone is that of other guests' hooks, too.
    Path(guest.paths.run_private).mkdir(parents=True)
    Path(guest.paths.react_hooks).write_text('{"hook": "10-slow", "token": null}\n')
    roots = {"ours": str(guest.root), "another's": str(tmp_path / "another"), "the system's": None}
    sleepers = {
        whose: subprocess.Popen(
            ["sleep", "60"], env={"VMFORK_HOOK": "10-slow", **({"VMFORK_ROOT": root} if root else {})}
        )
        for whose, root in roots.items()
    }
    try:
        with AdminDaemon(guest.paths, None):
            assert end(reactor(guest))[0] == 0
        assert {whose for whose, sleeper in sleepers.items() if sleeper.poll() is None} == {"another's", "the system's"}
    finally:
        for sleeper in sleepers.values():
            sleeper.kill()
            sleeper.wait()


def refused(call: str, when: str, error: str, *paths: Path) -> list[str]:
    """The words before a reactor whose kernel refuses this; what it starts is left alone."""
    injections = [
        Injection(call=call, when=when, fault=f"error={error}", path=str(path) if path else None)
        for path in paths or (None,)
    ]
    return strace(injections=injections)


# What a reactor does to start one hook, and the number of the call that belongs to the hook.
_STARTING = [
    ("pipe2", "2", "EMFILE"),
    ("clone,?clone3,?vfork", "1", "EAGAIN"),
    ("clone,?clone3,?vfork", "1", "ENOMEM"),
    ("pidfd_open", "1", "EMFILE"),
    ("epoll_ctl", "2", "ENOSPC"),
    ("epoll_ctl", "3", "ENOMEM"),
]


@pytest.mark.parametrize(("call", "when", "error"), _STARTING, ids=lambda value: value)
@pytest.mark.parametrize("early", [False, True], ids=["running", "early"])
def test_a_hook_that_cannot_be_started_now_is_started_by_the_same_reactor(
    guest: Guest, tmp_path: Path, call: str, when: str, error: str, early: bool
) -> None:
    need_ptrace()
    guest.hook("10-late", f"echo $$ >> {tmp_path}/pids; exec sleep 0.2")
    with AdminDaemon(guest.paths, Work(token="t1", early=early)) as daemon:
        code, said = end(reactor(guest, launcher=refused(call, when, error)))
    assert (code, daemon.calls.count("BeginReaction")) == (0, 1), said
    assert daemon.done[0].ok() == {"10-late"}
    assert "10-late: cannot be started now" in said
    assert not [pid for pid in pids_in(tmp_path / "pids") if alive(pid)]


def test_a_shipped_hook_that_cannot_be_forked_now_is_forked_later(guest: Guest) -> None:
    need_ptrace()
    guest.hook("10-rng", '#!/bin/sh\nexec vmforkctl action rng "$@"\n', directory=guest.lib)
    with AdminDaemon(guest.paths, Work(token="t1")) as daemon:
        code, said = end(reactor(guest, launcher=refused("clone", "1", "EAGAIN")))
    assert code == 0, said
    assert daemon.done[0].ok() == {"10-rng"}
    assert "10-rng: cannot be started now" in said


def test_a_reactor_that_cannot_import_the_actions_watches_the_child_that_could(guest: Guest) -> None:
    need_ptrace()
    guest.hook("10-rng", '#!/bin/sh\nexec vmforkctl action rng "$@"\n', directory=guest.lib)
    source = Path(actions.__file__)
    launcher = refused("openat", "1+", "EMFILE", source, Path(cache_from_source(str(source))))
    with AdminDaemon(guest.paths, Work(token="t1")) as daemon:
        code, said = end(reactor(guest, launcher=launcher))
    assert code == 0, said
    assert daemon.done[0].ok() == {"10-rng"}


@pytest.mark.parametrize("error", ["EIO", "EACCES", "ENOMEM"])
def test_without_a_look_at_all_hooks_there_is_no_result(guest: Guest, tmp_path: Path, error: str) -> None:
    need_ptrace()
    guest.hook("10-shipped", f"touch {tmp_path}/ran", directory=guest.lib)
    with AdminDaemon(guest.paths, Work(token="t1")) as daemon:
        code, said = end(reactor(guest, launcher=refused("getdents64", "1+", error, guest.etc)))
    assert (code, daemon.done) == (1, [])
    assert f"{guest.etc}: cannot be read: {os.strerror(getattr(errno, error))}" in said
    # The admin may have masked it there.
    assert not (tmp_path / "ran").exists()


def test_killed_at_fifty_random_instants_every_hook_completes_and_never_two_at_once(
    guest: Guest, tmp_path: Path
) -> None:
    need("flock", package="util-linux")
    names = [f"{number}-{word}" for number in (10, 20, 30) for word in ("a", "b")]
    for name in names:
        # A second copy of the same hook, or one of another number, finds the lock of its number taken.
        guest.hook(
            name,
            f"""
            exec 9>>{tmp_path}/lock-{name}
            flock -n 9 || echo "{name}" >> {tmp_path}/clashes
            echo "$VMFORK_FORK_TOKEN {name}" >> {tmp_path}/begun
            setsid sleep 0.15
            echo "$VMFORK_FORK_TOKEN {name}" >> {tmp_path}/ended
            """,
        )
    rounds = iter(range(1, 1000))

    def work() -> Work:
        number = next(rounds)
        return Work(token=f"t{number}", event=event(token=number.to_bytes(16, "big"), generation=number))

    instants = random.Random(4)
    with AdminDaemon(guest.paths, work(), lambda _: work()) as daemon:
        killed = 0
        while killed < 50:
            process = reactor(guest)
            time.sleep(instants.uniform(0.0, 0.6))
            process.kill()
            killed += end(process)[0] == -signal.SIGKILL
        for _ in range(2):
            last = daemon.job
            assert end(reactor(guest), timeout=60)[0] == 0
            assert daemon.done[-1] is last
    for done in daemon.done:
        assert done.ok() == set(names)
        assert done.event is not None
    ended = set((tmp_path / "ended").read_text().splitlines())
    assert {f"{done.event.token.hex()} {name}" for done in daemon.done if done.event for name in names} <= ended
    assert len((tmp_path / "begun").read_text().splitlines()) > len(ended), "no kill ever hit a hook"
    assert not (tmp_path / "clashes").exists()


def test_a_hook_that_is_disabled_where_the_disk_stumbles_is_not_run(guest: Guest, tmp_path: Path) -> None:
    need_ptrace()
    configuration = Path(guest.paths.config_etc, "vmfork.conf")
    configuration.parent.mkdir(parents=True, exist_ok=True)
    configuration.write_text("[Hook 10-never]\nEnable=no\n")
    guest.hook("10-never", f"touch {tmp_path}/ran")
    guest.hook("20-always", "true")
    # One reading is five tries.
    launcher = strace(injections=[Injection(call="openat", when="1..6", fault="error=EIO", path=str(configuration))])
    with AdminDaemon(guest.paths, Work(token="t1")) as daemon:
        code, said = end(reactor(guest, launcher=launcher))
    assert code == 0, said
    assert daemon.done[0].ok() == {"20-always"}
    assert not (tmp_path / "ran").exists()
