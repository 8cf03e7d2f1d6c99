# SPDX-License-Identifier: Apache-2.0
"""The lab's own parts that need no virtual machine: the channel's frames, the cache, the workspace."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from breaks import BREAKS, Break
from lab import cache
from lab.channel import Channel, CommandFailed
from lab.host import LabError
from lab.workspace import workspace

from support.breaking import apply

_SERVE = "import sys; from lab.guest_channel import Server; Server(int(sys.argv[1])).serve()"
_VM_TESTS = Path(__file__).parent


@pytest.fixture
def port() -> Iterator[socket.socket]:
    """The host's end of a port that the guest's program serves."""
    host, guest = socket.socketpair()
    command = [sys.executable, "-c", _SERVE, str(guest.fileno())]
    with host, guest, subprocess.Popen(command, cwd=_VM_TESTS, pass_fds=[guest.fileno()]) as process:
        yield host
        process.kill()


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", os.fspath(tmp_path))
    return cache.directory()


def test_a_command_is_answered_with_its_code_and_both_outputs(port: socket.socket) -> None:
    completed = Channel(port).run("sh", "-c", "cat; echo err >&2; exit 3", stdin="out\n")
    assert (completed.exit_code, completed.stdout, completed.stderr) == (3, "out\n", "err\n")


def test_a_command_that_is_no_program_fails(port: socket.socket) -> None:
    with pytest.raises(CommandFailed, match="no-such-program: No such file"):
        Channel(port).check("no-such-program")


def test_a_command_is_killed_with_its_children_at_its_timeout(port: socket.socket) -> None:
    completed = Channel(port).run("sh", "-c", "echo begun; sleep 60 & wait", timeout=0.5)
    assert (completed.exit_code, completed.stdout) == (None, "begun\n")


def test_a_long_command_does_not_block_another(port: socket.socket) -> None:
    channel = Channel(port)
    long = channel.send("cat", "/dev/stdin", stdin="x" * 1_000_000)
    assert channel.check("echo", "quick") == "quick\n"
    assert len(channel.answer(long, seconds=30).stdout) == 1_000_000


def test_half_a_request_of_another_host_is_discarded(port: socket.socket) -> None:
    port.sendall(b'{"id": "of the process before", "argv": ["ec')
    assert Channel(port).check("echo", "whole") == "whole\n"


def test_the_answer_to_another_hosts_request_is_not_taken_for_ours(port: socket.socket) -> None:
    before = Channel(port)
    before.send("echo", "asked before the snapshot")
    assert Channel(port).check("echo", "asked after it") == "asked after it\n"


def test_a_guest_that_is_gone_is_an_error(port: socket.socket) -> None:
    port.shutdown(socket.SHUT_RD)
    with pytest.raises(LabError, match="QEMU ended"):
        Channel(port).run("true")


def test_an_artefact_is_built_once(cached: Path) -> None:
    built = []

    def build(directory: Path) -> None:
        built.append(directory)
        (directory / "file").touch()

    first, second = (cache.artefact("thing", "0" * 16, build) for _ in range(2))
    assert first == second == cached / f"thing-{'0' * 16}"
    assert (first / "file").exists()
    assert len(built) == 1


def test_a_failed_build_leaves_nothing(cached: Path) -> None:
    def build(directory: Path) -> None:
        (directory / "half").touch()
        raise LabError("the archive does not answer")

    with pytest.raises(LabError, match="does not answer"):
        cache.artefact("thing", "0" * 16, build)
    assert [path.name for path in cached.iterdir()] == ["thing.lock"]


def test_what_a_killed_build_left_is_removed_by_the_next(cached: Path) -> None:
    (cached / ".partial-thing-1").mkdir()
    cache.artefact("thing", "0" * 16, lambda directory: None)
    assert not (cached / ".partial-thing-1").exists()


def made_by_another_run(name: str, number: int, *, then: str = "") -> subprocess.Popen[str]:
    """Another process that makes an artefact, says "made", and goes on with `then`."""
    make = f"from lab import cache; cache.artefact({name!r}, '{number:016}', lambda directory: None)"
    run = subprocess.Popen(
        [sys.executable, "-c", f"{make}; print('made', flush=True); {then}"],
        cwd=_VM_TESTS,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert run.stdout is not None
    assert run.stdout.readline() == "made\n"
    return run


def test_old_artefacts_of_the_same_name_go_and_others_stay(cached: Path) -> None:
    other = cache.artefact("thing-of-another-kind", "0" * 16, lambda directory: None)
    for number in range(4):
        made_by_another_run("thing", number).communicate()
        os.utime(cached / f"thing-{number:016}", (number, number))
    assert sorted(path.name for path in cached.glob("thing-0*")) == [f"thing-{number:016}" for number in (2, 3)]
    assert other.is_dir()


def test_an_artefact_that_another_run_uses_is_kept(cached: Path) -> None:
    with made_by_another_run("thing", 0, then="import sys; sys.stdin.read()"):
        os.utime(cached / f"thing-{0:016}", (0, 0))
        for number in (1, 2, 3):
            made_by_another_run("thing", number).communicate()
        assert (cached / f"thing-{0:016}").is_dir()


def test_a_workspace_goes_with_its_run_and_takes_those_of_killed_runs_along(cached: Path) -> None:
    (cached / "run-killed").mkdir()
    (cached / "run-killed.lock").touch()
    with workspace() as mine:
        assert not (cached / "run-killed").exists()
        with workspace() as another_run:
            assert another_run.exists()
        assert mine.exists()
    assert not mine.exists()


@pytest.mark.parametrize("one", BREAKS, ids=lambda one: one.name.replace(" ", "-"))
def test_a_break_finds_what_it_breaks_and_the_rows_that_must_see_it(one: Break, tmp_path: Path) -> None:
    top = _VM_TESTS.parents[1]
    copy = tmp_path / one.file
    copy.parent.mkdir(parents=True)
    copy.write_text((top / one.file).read_text())
    apply(tmp_path, one)
    assert one.broken in copy.read_text()
    for test in (*one.red, one.green):
        path, _, name = test.partition("::")
        assert f"def {name}(" in (top / path).read_text()
