# SPDX-License-Identifier: Apache-2.0
"""Functions registered with vmfork, run in a thread of a fresh interpreter against a real varlink service."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import vmfork
from support.forkservice import ForkService


class Program:
    """A program that uses the library; what it prints is read line by line."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().rstrip("\n")

    def go_on(self) -> None:
        """Answer the program's input()."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()

    def end(self) -> str:
        """Its standard error, after the end of its input."""
        _rest, errors = self._process.communicate(timeout=30)
        assert self._process.returncode == 0, errors
        return errors


@contextmanager
def program(root: Path, text: str) -> Iterator[Program]:
    """Run `text` between the import of what it needs and the end of its input."""
    lines = ["import os, logging, functools, vmfork", "print = functools.partial(print, flush=True)", text, "input()"]
    environment = {**os.environ, "VMFORK_ROOT": str(root), "PYTHONPATH": os.pathsep.join(sys.path)}
    # Unbuffered, the end of a line is a write of its own: lines of parent and child would mix.
    environment.pop("PYTHONUNBUFFERED", None)
    with subprocess.Popen(
        [sys.executable, "-c", "\n".join(lines)],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield Program(process)
            if process.poll() is None and process.stdin is not None and not process.stdin.closed:
                process.communicate("\n", timeout=30)
        finally:
            process.kill()


@pytest.fixture
def service(tmp_path: Path) -> Iterator[ForkService]:
    with ForkService(tmp_path) as running:
        yield running


def test_functions_run_in_the_order_of_registration_with_their_arguments(service: ForkService, tmp_path: Path) -> None:
    text = """
vmfork.register_after_fork(print, "first", 1, sep="-")
vmfork.register_after_fork(print, "second")
@vmfork.register_after_fork
def third():
    print("third")
"""
    with program(tmp_path, text) as running:
        service.await_subscribers(1)
        service.fork()
        assert [running.line() for _ in range(3)] == ["first-1", "second", "third"]
        service.await_acknowledgement(2)
        service.fork()
        assert running.line() == "first-1"


def test_an_exception_is_logged_and_the_rest_still_run(service: ForkService, tmp_path: Path) -> None:
    text = """
def broken(): raise ValueError("broken on purpose")
def leaving(): raise SystemExit(3)
for function in (broken, leaving, lambda: print("still here")): vmfork.register_after_fork(function)
"""
    with program(tmp_path, text) as running:
        service.await_subscribers(1)
        service.fork()
        assert running.line() == "still here"
        service.await_acknowledgement(2)
        running.go_on()
        errors = running.end()
    assert "broken on purpose" in errors
    assert "SystemExit" in errors


def test_an_unregistered_function_does_not_run(service: ForkService, tmp_path: Path) -> None:
    text = """
def gone(): print("gone")
vmfork.register_after_fork(gone)
vmfork.register_after_fork(gone)
vmfork.register_after_fork(print, "kept")
vmfork.unregister_after_fork(gone)
vmfork.unregister_after_fork(gone)
"""
    with program(tmp_path, text) as running:
        service.await_subscribers(1)
        service.fork()
        assert running.line() == "kept"


def test_functions_before_a_snapshot_run_in_reverse_and_are_then_acknowledged(
    service: ForkService, tmp_path: Path
) -> None:
    text = """
for number in (1, 2, 3): vmfork.register_before_snapshot(print, number)
def gone(): print("gone")
vmfork.register_before_snapshot(gone)
vmfork.unregister_before_snapshot(gone)
"""
    with program(tmp_path, text) as running:
        service.await_subscribers(1)
        service.tell("before-snapshot", snapshot=4)
        assert [running.line() for _ in range(3)] == ["3", "2", "1"]
        service.await_acknowledgement(1, 4)


def test_a_fork_just_after_the_registration_is_not_lost(service: ForkService, tmp_path: Path) -> None:
    text = 'vmfork.register_after_fork(print, "told"); print("registered")'
    with program(tmp_path, text) as running:
        assert running.line() == "registered"
        service.fork()
        assert running.line() == "told"


def test_the_daemon_may_come_later(tmp_path: Path) -> None:
    with program(tmp_path, 'vmfork.register_after_fork(print, "told"); print("registered")') as running:
        assert running.line() == "registered"
        with ForkService(tmp_path) as service:
            service.fork()
            assert running.line() == "told"


def test_a_fork_while_the_daemon_restarts_is_not_lost(service: ForkService, tmp_path: Path) -> None:
    with program(tmp_path, 'vmfork.register_after_fork(print, "told")') as running:
        service.await_subscribers(1)
        service.stop()
        service.fork(tell=False)
        service.start()
        assert running.line() == "told"
        service.await_acknowledgement(2)


def test_a_program_that_cannot_be_tracked_is_told_all_the_same(service: ForkService, tmp_path: Path) -> None:
    service.refuses_tracked = True
    with program(tmp_path, 'vmfork.register_after_fork(print, "told")') as running:
        service.await_subscribers(1)
        service.fork()
        assert running.line() == "told"


def test_a_child_of_fork_runs_them_as_well(service: ForkService, tmp_path: Path) -> None:
    text = """
def tell():
    print("child" if os.getpid() != parent else "parent")
    if os.getpid() != parent: os._exit(0)
parent = os.getpid()
vmfork.register_after_fork(tell)
import warnings; warnings.simplefilter("ignore")
if os.fork() == 0:
    import signal; signal.alarm(30)
    signal.pause()
"""
    with program(tmp_path, text + "\nprint('ready')") as running:
        assert running.line() == "ready"
        service.await_subscribers(2)
        service.fork()
        assert sorted([running.line(), running.line()]) == ["child", "parent"]


def test_a_child_is_not_told_of_the_fork_that_its_parent_has_handled(service: ForkService, tmp_path: Path) -> None:
    text = """
import warnings; warnings.simplefilter("ignore")
def tell():
    print("child" if os.getpid() != parent else "parent")
    if os.getpid() != parent: os._exit(0)
parent = os.getpid()
vmfork.register_after_fork(tell)
input()
if os.fork() == 0:
    import signal; signal.alarm(30)
    signal.pause()
"""
    with program(tmp_path, text) as running:
        service.await_subscribers(1)
        service.fork()
        assert running.line() == "parent"
        service.await_acknowledgement(2)
        running.go_on()
        service.await_subscribers(2)
        service.fork()
        assert sorted([running.line(), running.line()]) == ["child", "parent"]


def test_registering_never_raises_and_returns_the_function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "print(vmfork.register_after_fork(len, []) is len, vmfork.register_before_snapshot(len, ()) is len)"
    with program(tmp_path, text) as running:
        assert running.line() == "True True"


def test_unregistering_what_is_not_registered_is_nothing() -> None:
    vmfork.unregister_after_fork(len)
    vmfork.unregister_before_snapshot(len)
