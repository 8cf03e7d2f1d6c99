# SPDX-License-Identifier: Apache-2.0
"""Programs are bounded in time and output, and the service manager of another machine is left alone."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from support.actions import recorder, write
from vmfork.actions.commands import MAX_OUTPUT, Commands
from vmfork.errors import ActionError
from vmfork.paths import Paths


def commands(directory: Path, *, deadline_sec: float | None = None, early: bool = False) -> Commands:
    return Commands(
        Paths(""), deadline_sec=deadline_sec, early=early, search=(str(directory), "/usr/bin", "/bin"), systemd=True
    )


def test_output_code_and_standard_input_reach_their_places(tmp_path: Path) -> None:
    finished = commands(tmp_path).run("sh", "-c", "cat; echo oops >&2; exit 3", stdin=b"hello")
    assert (finished.stdout, finished.stderr, finished.code) == (b"hello", b"oops\n", 3)


def test_the_environment_is_scrubbed(tmp_path: Path) -> None:
    names = {line.partition("=")[0] for line in commands(tmp_path).run("env").text.splitlines()}
    assert names == {"PATH", "LANG"}


def test_a_program_that_does_not_end_is_killed_in_time(tmp_path: Path) -> None:
    start = time.monotonic()
    with pytest.raises(ActionError, match="did not end in time"):
        commands(tmp_path).run("sleep", "60", timeout=0.3)
    assert time.monotonic() - start < 5


def test_the_deadline_of_the_hook_counts_more_than_the_wish(tmp_path: Path) -> None:
    start = time.monotonic()
    with pytest.raises(ActionError, match="did not end in time"):
        commands(tmp_path, deadline_sec=1).run("sleep", "60", timeout=50)
    assert time.monotonic() - start < 5


def test_a_daemon_that_keeps_the_pipes_open_is_not_waited_for(tmp_path: Path) -> None:
    start = time.monotonic()
    finished = commands(tmp_path).run("sh", "-c", "sleep 20 & echo started")
    assert (finished.text, time.monotonic() - start < 10) == ("started\n", True)


def test_a_flood_of_output_is_cut_and_does_not_stop_the_program(tmp_path: Path) -> None:
    finished = commands(tmp_path).run("sh", "-c", "head -c 20000000 /dev/zero; exit 4")
    assert (len(finished.stdout), finished.code) == (MAX_OUTPUT, 4)


def test_a_missing_program_names_its_package(tmp_path: Path) -> None:
    with pytest.raises(ActionError) as caught:
        commands(tmp_path).need("no-such-program", package="some-package")
    assert "some-package" in str(caught.value.hint)


def test_a_program_that_cannot_be_started_is_no_traceback(tmp_path: Path) -> None:
    write(tmp_path / "broken", "#!/no/such/interpreter\n", mode=0o755)
    with pytest.raises(ActionError, match="cannot run"):
        commands(tmp_path).run("broken")


def test_the_last_words_of_a_failing_program_are_told(tmp_path: Path) -> None:
    with pytest.raises(ActionError, match="sh failed: the disk melted"):
        commands(tmp_path).check("sh", "-c", "echo first; echo the disk melted >&2; exit 1")


def test_in_the_early_boot_nothing_waits_for_the_service_manager(tmp_path: Path) -> None:
    calls = recorder(tmp_path, "systemctl")
    commands(tmp_path, early=True).systemctl("try-restart", "a.service")
    assert calls.read_text() == "systemctl --no-block try-restart -- a.service\n"


def test_below_a_root_the_service_manager_is_never_talked_to(tmp_path: Path) -> None:
    (tmp_path / "run/systemd/system").mkdir(parents=True)
    calls = recorder(tmp_path, "systemctl")
    below = Commands(Paths(str(tmp_path)), search=(str(tmp_path),))
    assert not below.is_active("a.service")
    with pytest.raises(ActionError):
        below.systemctl("restart", "a.service")
    assert not calls.exists()
