# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from support.hooks import QUICK, TOKEN, Guest, Recorder, alive, always, event, occasion, pids_in, run
from support.limits import descriptors
from vmfork import ids
from vmfork.model import EventState, HookOutcome, HookResult
from vmfork.reactor.descendants import Process, read_process
from vmfork.reactor.discovery import discover, runnable
from vmfork.reactor.engine import Engine
from vmfork.reactor.inprocess import InProcess
from vmfork.reactor.phases import Phase
from vmfork.reactor.process import Limits
from vmfork.reactor.spawn import Launch

PATIENT = Limits(timeout_sec=20, retry_pause_sec=0.02)


@pytest.fixture
def guest(tmp_path: Path) -> Guest:
    return Guest(tmp_path)


def test_exit_codes_become_results(guest: Guest) -> None:
    guest.hook("10-fine", "exit 0")
    guest.hook("11-skips", "exit 77")
    guest.hook("12-fails", "exit 3")
    guest.hook("13-dies", "kill -9 $$")
    seen = run(guest, limits=PATIENT).results
    assert [(one.result, one.exit_code, one.signal) for one in seen.values()] == [
        (HookOutcome.OK, 0, None),
        (HookOutcome.SKIPPED, 77, None),
        (HookOutcome.FAILED, 3, None),
        (HookOutcome.FAILED, None, 9),
    ]


def test_a_failed_hook_stops_no_other_and_fails_the_reaction(guest: Guest) -> None:
    guest.hook("10-fails", "exit 1")
    guest.hook("20-later", "exit 0")
    seen = run(guest, limits=PATIENT)
    assert seen.outcomes()["20-later"] is HookOutcome.OK
    assert seen.state is EventState.FAILED


def test_skipped_and_masked_hooks_leave_the_reaction_settled(guest: Guest) -> None:
    guest.hook("10-skips", "exit 77")
    (guest.etc / "20-masked").symlink_to("/dev/null")
    seen = run(guest, limits=PATIENT)
    assert seen.outcomes() == {"20-masked": HookOutcome.MASKED, "10-skips": HookOutcome.SKIPPED}
    assert seen.state is EventState.SETTLED


def test_an_untrusted_hook_is_not_run_and_fails_the_reaction(guest: Guest, tmp_path: Path) -> None:
    guest.hook("10-open", f"touch {tmp_path}/ran", mode=0o777)
    guest.hook("20-fine", "exit 0")
    seen = run(guest, limits=PATIENT)
    assert seen.outcomes() == {"10-open": HookOutcome.UNTRUSTED, "20-fine": HookOutcome.OK}
    assert seen.state is EventState.FAILED
    assert not (tmp_path / "ran").exists()


def test_equal_numbers_run_side_by_side_and_the_next_number_waits(guest: Guest, tmp_path: Path) -> None:
    # Each of the two ends only once the other one runs.
    for me, other in (("a", "b"), ("b", "a")):
        guest.hook(f"10-{me}", f"touch {tmp_path}/{me}; until [ -e {tmp_path}/{other} ]; do sleep 0.01; done")
    guest.hook("20-after", "exit 0")
    seen = run(guest, limits=PATIENT)
    assert seen.state is EventState.SETTLED
    assert seen.course[-2:] == [("start", "20-after"), ("end", "20-after")]


def test_before_a_snapshot_the_order_is_reversed(guest: Guest, tmp_path: Path) -> None:
    for name in ("10-a", "20-b", "30-c"):
        guest.hook(name, f'echo "$1 {name}" >> {tmp_path}/log')
    run(guest, on=occasion(guest, Phase.BEFORE_SNAPSHOT), limits=PATIENT)
    run(guest, on=occasion(guest, Phase.AFTER_SNAPSHOT), limits=PATIENT)
    lines = (tmp_path / "log").read_text().splitlines()
    assert lines[:3] == ["before-snapshot 30-c", "before-snapshot 20-b", "before-snapshot 10-a"]
    assert lines[3:] == ["after-snapshot 10-a", "after-snapshot 20-b", "after-snapshot 30-c"]


def test_the_event_is_on_stdin_and_holds_no_generation_id(guest: Guest, tmp_path: Path) -> None:
    guest.hook("10-reads", f"cat > {tmp_path}/first")
    guest.hook("10-reads-too", f"cat > {tmp_path}/second")
    run(guest, limits=PATIENT)
    assert (tmp_path / "first").read_text() == (tmp_path / "second").read_text()
    said = json.loads((tmp_path / "first").read_text())
    assert said["token"] == TOKEN.hex()
    assert said["generation_id"] is None
    assert "early" not in said


def test_in_the_early_boot_the_event_says_so_and_75_is_final(guest: Guest, tmp_path: Path) -> None:
    guest.hook("10-again", f"cat > {tmp_path}/event; echo x >> {tmp_path}/tries; exit 75")
    early = Limits(timeout_sec=20, retries=False)
    seen = run(guest, on=occasion(guest, early=True), limits=early)
    assert json.loads((tmp_path / "event").read_text())["early"] is True
    assert (tmp_path / "tries").read_text() == "x\n"
    assert seen.outcomes() == {"10-again": HookOutcome.FAILED}


def test_75_is_tried_again_until_it_works(guest: Guest, tmp_path: Path) -> None:
    guest.hook("10-again", f"echo x >> {tmp_path}/tries; [ $(wc -l < {tmp_path}/tries) = 3 ] || exit 75")
    seen = run(guest, limits=PATIENT)
    assert seen.outcomes() == {"10-again": HookOutcome.OK}
    assert seen.course == [("start", "10-again"), ("end", "10-again")]


def test_a_hook_has_its_own_session_and_no_descriptor_but_three(guest: Guest, tmp_path: Path) -> None:
    leaked = os.open("/dev/null", os.O_RDONLY)
    os.set_inheritable(leaked, True)
    guest.python_hook(
        "10-looks",
        f"""
        import os, signal
        fds = sorted(int(n) for n in os.listdir("/proc/self/fd"))[:-1]
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, [])
        umask = os.umask(0)
        ignored = [s for s in (signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1) if signal.getsignal(s) != signal.SIG_DFL]
        said = [fds, os.getsid(0) == os.getpid(), os.getcwd(), umask, sorted(mask), ignored]
        open("{tmp_path}/said", "w").write(repr(said))
        """,
    )
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert run(guest, limits=PATIENT).state is EventState.SETTLED
    finally:
        signal.signal(signal.SIGHUP, before)
        os.close(leaked)
    assert (tmp_path / "said").read_text() == repr([[0, 1, 2], True, "/", 0o022, [], []])


def test_ok_hooks_of_an_earlier_run_are_not_run_again(guest: Guest) -> None:
    for name in ("10-ok", "20-failed", "30-skipped", "40-interrupted"):
        guest.hook(name, "exit 0")
    earlier = [
        HookResult(name=name, path="/x", result=HookOutcome(name.partition("-")[2]))
        for name in ("10-ok", "20-failed", "30-skipped", "40-interrupted")
    ]
    seen = run(guest, limits=PATIENT, finished=earlier)
    assert set(seen.results) == {"20-failed", "30-skipped", "40-interrupted"}


def test_a_timed_out_hook_is_told_to_end_and_reported(guest: Guest, tmp_path: Path) -> None:
    guest.hook("10-slow", f"trap 'touch {tmp_path}/told; exit 0' TERM; sleep 60 & wait")
    guest.hook("20-fine", "exit 0")
    seen = run(guest)
    assert seen.outcomes() == {"10-slow": HookOutcome.TIMEOUT, "20-fine": HookOutcome.OK}
    assert (tmp_path / "told").exists()
    assert seen.state is EventState.FAILED


def test_an_interrupted_run_ends_its_hooks_and_starts_no_more(guest: Guest, tmp_path: Path) -> None:
    guest.hook("10-slow", f"echo $$ > {tmp_path}/pids; exec sleep 60")
    guest.hook("10-slow-too", f"(trap '' TERM; setsid sleep 60 & echo $! >> {tmp_path}/other; wait)")
    guest.hook("20-never", f"touch {tmp_path}/ran")
    recorder = Recorder()
    with Engine(occasion(guest), lambda _: PATIENT, recorder) as engine:

        def alarm(*_: object) -> None:
            if (tmp_path / "pids").exists() and (tmp_path / "other").exists():
                signal.setitimer(signal.ITIMER_REAL, 0)
                engine.interrupt()

        before = signal.signal(signal.SIGALRM, alarm)
        wakeup = signal.set_wakeup_fd(engine.wakeup)
        signal.setitimer(signal.ITIMER_REAL, 0.05, 0.05)
        try:
            began = time.monotonic()
            state = engine.run(runnable(discover(guest.paths, always)))
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
            signal.set_wakeup_fd(wakeup)
    assert state is EventState.SUPERSEDED
    assert time.monotonic() - began < 5
    assert recorder.outcomes() == {"10-slow": HookOutcome.INTERRUPTED, "10-slow-too": HookOutcome.INTERRUPTED}
    assert recorder.state is None
    assert not (tmp_path / "ran").exists()
    assert not [pid for pid in pids_in(tmp_path / "pids") + pids_in(tmp_path / "other") if alive(pid)]


def test_a_reporter_may_interrupt_before_a_hook_is_started(guest: Guest, tmp_path: Path) -> None:
    guest.hook("10-first", "exit 0")
    guest.hook("20-second", f"touch {tmp_path}/ran")
    recorder = Recorder()
    with Engine(occasion(guest), lambda _: PATIENT, recorder) as engine:
        recorder.on_start = lambda hook: engine.interrupt() if hook.name == "20-second" else None
        engine.run(runnable(discover(guest.paths, always)))
    assert ("end", "10-first") in recorder.course
    assert recorder.outcomes()["20-second"] is HookOutcome.INTERRUPTED
    assert recorder.results["20-second"].duration_ms is None
    assert not (tmp_path / "ran").exists()


class NewsWhileStarting:
    """Records whose `runs`, the last step of starting a hook, is where a newer fork becomes known."""

    def __init__(self) -> None:
        self.interrupt: Callable[[], None] = lambda: None

    def begins(self, hook: str, token: str | None) -> None:
        pass

    def runs(self, hook: str, token: str | None, process: Process) -> None:
        self.interrupt()

    def ended(self, hook: str) -> None:
        pass


def test_a_hook_during_whose_start_the_run_is_interrupted_is_ended_at_once(guest: Guest) -> None:
    guest.hook("10-slow", "exec sleep 15")
    recorder, records = Recorder(), NewsWhileStarting()
    with Engine(occasion(guest), lambda _: PATIENT, recorder, records=records) as engine:
        records.interrupt = engine.interrupt
        began = time.monotonic()
        state = engine.run(runnable(discover(guest.paths, always)))
    assert state is EventState.SUPERSEDED
    assert time.monotonic() - began < 5
    assert recorder.outcomes() == {"10-slow": HookOutcome.INTERRUPTED}


class Refusing:
    """A kernel that starts no process the first `times` times."""

    def __init__(self, number: int, *, times: int) -> None:
        self.number = number
        self.times = times

    def start(self, launch: Launch) -> int | None:
        self.times -= 1
        if self.times >= 0:
            raise OSError(self.number, os.strerror(self.number))
        return None


@pytest.mark.parametrize("early", [False, True], ids=["running", "early"])
@pytest.mark.parametrize("name", ["EAGAIN", "ENOMEM", "ENFILE", "EMFILE", "ETXTBSY"])
def test_a_hook_that_cannot_be_started_for_now_is_tried_until_it_can(guest: Guest, name: str, early: bool) -> None:
    guest.hook("10-late", "exit 0")
    limits = Limits(timeout_sec=20, retry_pause_sec=0.005, retries=not early)
    seen = run(guest, limits=limits, starters=[Refusing(getattr(errno, name), times=5)])
    assert seen.outcomes() == {"10-late": HookOutcome.OK}
    assert seen.course == [("start", "10-late"), ("end", "10-late")]


def test_a_refused_start_takes_none_of_the_tries_of_75(guest: Guest, tmp_path: Path) -> None:
    guest.hook("10-again", f"echo x >> {tmp_path}/tries; [ $(wc -l < {tmp_path}/tries) = 3 ] || exit 75")
    seen = run(guest, limits=PATIENT, starters=[Refusing(errno.EAGAIN, times=2)])
    assert seen.outcomes() == {"10-again": HookOutcome.OK}


def test_a_process_that_cannot_be_looked_at_for_now_is_not_taken_for_one_that_ended() -> None:
    with descriptors(free=0), pytest.raises(OSError, match="Too many open files"):
        read_process(os.getpid())


def test_a_hook_that_cannot_be_started_in_its_time_fails_with_a_reason(
    guest: Guest, caplog: pytest.LogCaptureFixture
) -> None:
    guest.hook("10-never", "exit 0")
    guest.hook("20-never-either", "exit 0")
    seen = run(guest, limits=QUICK, starters=[Refusing(errno.EAGAIN, times=1000)])
    assert set(seen.outcomes().values()) == {HookOutcome.FAILED}
    (said,) = [one for one in caplog.records if one.levelname == "ERROR" and "10-never" in one.getMessage()]
    assert "cannot be started: Resource temporarily unavailable" in said.getMessage()
    assert vars(said)["MESSAGE_ID"] == ids.HOOK_FAILED


def test_a_hook_that_waits_to_be_started_is_interrupted(guest: Guest) -> None:
    guest.hook("10-never", "exit 0")
    recorder, refusing = Recorder(), Refusing(errno.EAGAIN, times=1000)
    limits = Limits(timeout_sec=60, retry_pause_sec=60)
    with Engine(occasion(guest), lambda _: limits, recorder, starters=[refusing]) as engine:
        signal.signal(signal.SIGALRM, lambda *_: engine.interrupt())
        signal.setitimer(signal.ITIMER_REAL, 0.05, 0.05)
        try:
            state = engine.run(runnable(discover(guest.paths, always)))
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
    assert state is EventState.SUPERSEDED
    assert recorder.outcomes() == {"10-never": HookOutcome.INTERRUPTED}


def test_a_hook_that_cannot_be_started_fails_with_a_reason(guest: Guest, caplog: pytest.LogCaptureFixture) -> None:
    (guest.etc / "10-no-header").write_text("echo hello\n")
    (guest.etc / "10-no-header").chmod(0o755)
    guest.hook("20-no-interpreter", f"#!{guest.root}/no/interpreter\n")
    seen = run(guest, limits=PATIENT)
    assert set(seen.outcomes().values()) == {HookOutcome.FAILED}
    assert "begin with a #! line" in caplog.text
    assert "is the interpreter" in caplog.text


def test_output_is_logged_line_by_line_with_fields(guest: Guest, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    guest.hook("10-talks", "printf 'one\\ntwo\\033[31m'; echo three >&2; printf 'four'")
    run(guest, limits=PATIENT)
    said = [one for one in caplog.records if getattr(one, "VMFORK_HOOK", None) == "10-talks" and one.args]
    lines = [one.getMessage() for one in said if one.levelname == "INFO"]
    assert lines == ["10-talks: one", "10-talks: two\\x1b[31mthree", "10-talks: four"]
    assert {vars(one)["VMFORK_GENERATION"] for one in said} == {7}
    assert {vars(one)["MESSAGE_ID"] for one in said if one.levelname == "INFO"} == {ids.HOOK_OUTPUT}


def test_a_daemon_that_a_good_hook_leaves_keeps_running_and_is_noted(
    guest: Guest, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    guest.hook("10-daemon", f"setsid sleep 60 >/dev/null 2>&1 </dev/null & echo $! > {tmp_path}/pids")
    guest.hook("20-holds", f"setsid sleep 60 & echo $! >> {tmp_path}/pids")
    began = time.monotonic()
    seen = run(guest, limits=PATIENT)
    pids = pids_in(tmp_path / "pids")
    try:
        assert set(seen.outcomes().values()) == {HookOutcome.OK}
        assert time.monotonic() - began < 4
        assert all(alive(pid) for pid in pids)
        assert f"10-daemon: left process {pids[0]} running" in caplog.text
        assert "20-holds: a process that it left behind holds its output open" in caplog.text
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)


def test_a_clock_step_below_ten_milliseconds_is_none(guest: Guest) -> None:
    guest.hook("10-fine", "exit 0")
    assert run(guest, limits=PATIENT).step is None


def test_a_shipped_hook_runs_without_exec_under_the_same_contract(guest: Guest, tmp_path: Path) -> None:
    guest.hook("10-rng", '#!/bin/sh\nexec vmforkctl action rng "$@"\n', directory=guest.lib)
    said = tmp_path / "said"

    def action(name: str, argv: object, settings: object) -> int:
        fds = [fd for fd in range(64) if os.path.exists(f"/proc/self/fd/{fd}")]
        stdin = json.loads(os.read(0, 65536))["token"] == TOKEN.hex()
        session = os.getsid(0) == os.getpid()
        environment = subprocess.run(["env"], check=True, capture_output=True, text=True).stdout
        said.write_text(repr([name, argv, stdin, session, os.getcwd(), fds, "HOME=" in environment]))
        return 77 if os.environ["VMFORK_HOOK"] == "10-rng" else 1

    seen = run(guest, limits=PATIENT, starters=[InProcess(lambda _: {}, action)])
    assert said.read_text() == repr(["rng", ("after-fork",), True, True, "/", [0, 1, 2], False])
    assert seen.outcomes() == {"10-rng": HookOutcome.SKIPPED}


@pytest.mark.parametrize("directory", ["lib-changed", "etc"])
def test_a_changed_or_admins_hook_is_run_by_exec(guest: Guest, tmp_path: Path, directory: str) -> None:
    text = '#!/bin/sh\nexec vmforkctl action rng "$@"\n'
    where = guest.etc if directory == "etc" else guest.lib
    guest.hook("10-rng", text if directory == "etc" else text + "# changed\n", directory=where)

    def action(name: str, argv: object, settings: object) -> int:
        (tmp_path / "ran").touch()
        return 0

    run(guest, limits=PATIENT, starters=[InProcess(lambda _: {}, action)])
    assert not (tmp_path / "ran").exists()


def test_an_action_that_raises_ends_in_its_own_process(guest: Guest, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    guest.hook("10-rng", '#!/bin/sh\nexec vmforkctl action rng "$@"\n', directory=guest.lib)
    here = os.getpid()

    def action(name: str, argv: object, settings: object) -> int:
        assert os.getpid() != here
        raise KeyboardInterrupt("of the action")

    seen = run(guest, limits=PATIENT, starters=[InProcess(lambda _: {}, action)])
    assert seen.outcomes() == {"10-rng": HookOutcome.FAILED}
    assert "KeyboardInterrupt: of the action" in caplog.text


def test_the_limits_are_asked_for_by_the_hooks_name(guest: Guest) -> None:
    guest.hook("10-slow", "sleep 60")
    guest.hook("20-fine", "sleep 0.6")
    recorder = Recorder()

    def limits_of(name: str) -> Limits:
        return QUICK if name == "10-slow" else PATIENT

    with Engine(occasion(guest), limits_of, recorder) as engine:
        engine.run(runnable(discover(guest.paths, always)))
    assert recorder.outcomes() == {"10-slow": HookOutcome.TIMEOUT, "20-fine": HookOutcome.OK}


def test_no_descriptor_or_child_is_left(guest: Guest) -> None:
    for number in range(8):
        guest.hook(f"10-hook{number}", "exit 0")
    before = sorted(os.listdir("/proc/self/fd"))
    run(guest, limits=PATIENT)
    assert sorted(os.listdir("/proc/self/fd")) == before
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def test_an_event_larger_than_a_pipe_is_read_whole(guest: Guest, tmp_path: Path) -> None:
    many = tuple(HookResult(name=f"10-h{n}", path="/" + "p" * 200, result=HookOutcome.OK) for n in range(1000))
    guest.hook("90-size", f"sleep 0.05; wc -c > {tmp_path}/size")
    guest.hook("91-ignores", "exec 0<&-; exit 0")
    assert run(guest, on=occasion(guest, event=event(hooks=many)), limits=PATIENT).state is EventState.SETTLED
    assert int((tmp_path / "size").read_text()) > 200_000
