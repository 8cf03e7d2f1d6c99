# SPDX-License-Identifier: Apache-2.0
"""Which processes count as a daemon: only what the kernel vouches for."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from support.tools import need_root
from vmfork.actions import processes
from vmfork.paths import Paths

PATHS = Paths("")


@pytest.fixture
def program(tmp_path: Path) -> Path:
    """A program of the test's own, so that no other process runs it."""
    copy = tmp_path / "vmforktestd"
    shutil.copy("/bin/sleep", copy)
    tmp_path.chmod(0o755)
    for parent in tmp_path.parents[:2]:
        parent.chmod(parent.stat().st_mode | 0o011)
    return copy


@contextmanager
def running(*argv: str, **more: int) -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(argv, **more) as child:  # type: ignore[call-overload]
        try:
            assert processes.wait_until(lambda: _has_executed(child.pid), timeout=20)
            yield child
        finally:
            child.kill()


def _has_executed(pid: int) -> bool:
    # Popen returns while execve is still being carried out: the arguments come last.
    return os.readlink(f"/proc/{pid}/exe") != os.readlink("/proc/self/exe") and bool(
        Path(f"/proc/{pid}/cmdline").read_bytes()
    )


def pids(program: Path) -> list[int]:
    return [process.pid for process in processes.daemons(PATHS, str(program))]


def test_a_daemon_of_root_is_found_with_its_arguments(program: Path) -> None:
    need_root()
    with running(str(program), "60") as child:
        (found,) = processes.daemons(PATHS, str(program))
        assert (found.pid, found.parent, found.argv) == (child.pid, os.getpid(), (str(program), "60"))


def test_a_process_of_another_user_is_not_believed(program: Path) -> None:
    need_root()
    with running(str(program), "60", user=65534):
        assert pids(program) == []


def test_another_program_under_the_same_name_is_not_believed(program: Path, tmp_path: Path) -> None:
    need_root()
    (tmp_path / "other").mkdir()
    imposter = tmp_path / "other" / program.name
    shutil.copy("/bin/sleep", imposter)
    with running(str(imposter), "60"):
        assert pids(program) == []


@pytest.mark.parametrize("kind", ["--mount", "--net"])
def test_a_process_in_another_namespace_is_not_believed(program: Path, kind: str) -> None:
    need_root()
    with running("unshare", kind, str(program), "60") as child:
        assert processes.wait_until(lambda: Path(f"/proc/{child.pid}/comm").read_text().startswith("vmfork"), timeout=5)
        assert pids(program) == []


def test_a_replaced_program_is_still_the_same_daemon(program: Path) -> None:
    need_root()
    with running(str(program), "60") as child:
        program.unlink()
        shutil.copy("/bin/sleep", program)
        assert pids(program) == [child.pid]


def test_exec_makes_another_image_of_the_same_process(program: Path) -> None:
    with subprocess.Popen(["sh", "-c", f"read go; exec {program} 60"], stdin=subprocess.PIPE) as child:
        before = processes.look(PATHS, child.pid)
        assert child.stdin is not None
        child.stdin.write(b"\n")
        child.stdin.flush()
        assert processes.wait_until(lambda: Path(f"/proc/{child.pid}/comm").read_text() != "sh\n", timeout=5)
        after = processes.look(PATHS, child.pid)
        assert before is not None
        assert after is not None
        assert before.pid == after.pid
        assert before.image != after.image
        assert not processes.tell(before, PATHS, signal.SIGTERM), "another image is not signalled"
        assert processes.tell(after, PATHS, signal.SIGTERM)


def test_a_process_is_killed_and_waited_for(program: Path) -> None:
    with running(str(program), "60") as child:
        process = processes.look(PATHS, child.pid)
        assert process is not None
        assert processes.kill(process, PATHS, timeout=5)
        assert processes.look(PATHS, child.pid) is None


def test_a_process_that_ended_is_no_process() -> None:
    with subprocess.Popen(["true"]) as child:
        child.wait()
        assert processes.look(PATHS, child.pid) is None


def test_who_holds_a_listening_socket_is_told_from_who_does_not() -> None:
    with socket.create_server(("127.0.0.1", 0)) as door:
        assert processes.listens(PATHS, os.getpid())
        with socket.create_connection(door.getsockname()):
            door.close()
            assert not processes.listens(PATHS, os.getpid())


def test_a_daemon_of_its_own_account_counts_only_where_that_account_is_named(program: Path) -> None:
    need_root()
    account = pwd.getpwnam("nobody")
    with running(str(program), "60", user=account.pw_uid, group=account.pw_gid) as child:
        assert processes.daemons(PATHS, str(program)) == ()
        assert processes.daemons(PATHS, str(program), owner="no-such-account") == ()
        assert [found.pid for found in processes.daemons(PATHS, str(program), owner="nobody")] == [child.pid]


def test_grandchildren_are_descendants_and_strangers_are_not(program: Path) -> None:
    with running("sh", "-c", f"sh -c '{program} 60 & wait' & wait") as child, running(str(program), "60") as stranger:
        assert processes.wait_until(lambda: len(processes.descendants(PATHS, child.pid)) == 2, timeout=10)
        nearest, farthest = processes.descendants(PATHS, child.pid)
        assert (nearest.parent, farthest.parent) == (child.pid, nearest.pid)
        assert processes.wait_until(lambda: _has_executed(farthest.pid), timeout=10)
        assert stranger.pid not in (nearest.pid, farthest.pid)
        for one in (farthest, nearest):
            assert processes.kill(one, PATHS, timeout=5)
