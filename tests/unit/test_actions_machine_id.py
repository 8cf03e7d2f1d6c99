# SPDX-License-Identifier: Apache-2.0
"""A new machine ID, on a guest in a directory."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from support.actions import killed_at_step, prepared, recorder, tree, write
from vmfork.actions import machine_id, perform
from vmfork.model import IdentityPolicy

OLD = "0123456789abcdef0123456789abcdef"
UNITS = "systemd-networkd.service systemd-journald.service systemd-resolved.service"


def guest(root: Path, content: str = OLD + "\n") -> Path:
    return write(root / "etc/machine-id", content, mode=0o444)


def read(root: Path) -> str:
    return (root / "etc/machine-id").read_text().strip()


def test_the_new_id_is_random_and_has_the_form_of_systemds(tmp_path: Path) -> None:
    guest(tmp_path)
    assert perform(machine_id.ACTION, prepared(tmp_path).context) == 0
    new = read(tmp_path)
    assert re.fullmatch(r"[0-9a-f]{12}4[0-9a-f]{3}[89ab][0-9a-f]{15}", new)
    assert perform(machine_id.ACTION, prepared(tmp_path).context) == 0
    assert len({OLD, new, read(tmp_path)}) == 3


def test_the_file_stays_read_only_for_all(tmp_path: Path) -> None:
    perform(machine_id.ACTION, prepared(guest(tmp_path).parents[1]).context)
    assert (tmp_path / "etc/machine-id").stat().st_mode & 0o777 == 0o444


@pytest.mark.parametrize("content", ["", "\n", "uninitialized\n"])
def test_a_file_that_waits_for_the_first_boot_is_left_alone(tmp_path: Path, content: str) -> None:
    guest(tmp_path, content)
    assert perform(machine_id.ACTION, prepared(tmp_path).context) == 77
    assert (tmp_path / "etc/machine-id").read_text() == content


def test_without_a_file_the_action_is_skipped(tmp_path: Path) -> None:
    assert perform(machine_id.ACTION, prepared(tmp_path).context) == 77


def test_a_guest_that_keeps_its_identity_is_left_alone(tmp_path: Path) -> None:
    guest(tmp_path)
    assert perform(machine_id.ACTION, prepared(tmp_path, identity=IdentityPolicy.KEEP).context) == 77
    assert read(tmp_path) == OLD


def test_a_dry_run_says_all_and_changes_nothing(tmp_path: Path) -> None:
    guest(tmp_path)
    write(tmp_path / "var/lib/dbus/machine-id", OLD + "\n")
    before = tree(tmp_path)
    run = prepared(tmp_path, dry_run=True)
    assert perform(machine_id.ACTION, run.context) == 0
    assert tree(tmp_path) == before
    assert "would write a new random machine ID" in run.said
    assert "would replace" in run.said


def test_a_dbus_copy_becomes_a_link(tmp_path: Path) -> None:
    guest(tmp_path)
    copy = write(tmp_path / "var/lib/dbus/machine-id", OLD + "\n")
    perform(machine_id.ACTION, prepared(tmp_path).context)
    assert str(copy.readlink()) == "/etc/machine-id"


def test_a_dbus_link_is_left_as_it_is(tmp_path: Path) -> None:
    guest(tmp_path)
    link = tmp_path / "var/lib/dbus/machine-id"
    link.parent.mkdir(parents=True)
    link.symlink_to("/etc/machine-id")
    inode = link.lstat().st_ino
    perform(machine_id.ACTION, prepared(tmp_path).context)
    assert link.lstat().st_ino == inode


def test_a_linked_machine_id_is_written_where_the_link_points(tmp_path: Path) -> None:
    write(tmp_path / "data/machine-id", OLD + "\n")
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/machine-id").symlink_to("/data/machine-id")
    assert perform(machine_id.ACTION, prepared(tmp_path).context) == 0
    assert (tmp_path / "etc/machine-id").is_symlink()
    assert (tmp_path / "data/machine-id").read_text().strip() != OLD


def test_an_id_on_the_kernel_command_line_is_a_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    guest(tmp_path)
    write(tmp_path / "proc/cmdline", f"root=/dev/vda systemd.machine_id={OLD} quiet\n")
    assert perform(machine_id.ACTION, prepared(tmp_path).context) == 1
    assert "kernel command line dictates" in capsys.readouterr().err
    assert read(tmp_path) == OLD


def test_an_id_from_a_credential_is_a_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    guest(tmp_path)
    write(tmp_path / "run/credentials/@system/system.machine_id", OLD)
    assert perform(machine_id.ACTION, prepared(tmp_path).context) == 1
    assert "credential" in capsys.readouterr().err


def test_journals_under_the_old_id_are_listed(tmp_path: Path) -> None:
    guest(tmp_path)
    (tmp_path / f"var/log/journal/{OLD}").mkdir(parents=True)
    run = prepared(tmp_path)
    perform(machine_id.ACTION, run.context)
    assert f"still holds the old machine ID: {tmp_path}/var/log/journal/{OLD}" in run.said


def test_a_process_with_a_file_of_the_old_id_open_is_listed(tmp_path: Path) -> None:
    guest(tmp_path)
    write(tmp_path / "proc/42/comm", "rsyslogd\n")
    (tmp_path / "proc/42/fd").mkdir()
    (tmp_path / "proc/42/fd/3").symlink_to(f"/var/log/journal/{OLD}/system.journal")
    run = prepared(tmp_path)
    perform(machine_id.ACTION, run.context)
    assert "process 42 (rsyslogd)" in run.said


def manager(root: Path, *, script: str) -> tuple[Path, Path]:
    programs = root / "programs"
    recorder(programs, "journalctl")
    return programs, recorder(programs, "systemctl", script=script)


def test_running_daemons_are_restarted_in_order_without_waiting_and_the_journal_first_rotated(tmp_path: Path) -> None:
    guest(tmp_path)
    programs, calls = manager(tmp_path, script="exit 0")
    assert perform(machine_id.ACTION, prepared(tmp_path, programs=programs, systemd=True).context) == 0
    acts = [line for line in calls.read_text().splitlines() if "is-active" not in line]
    assert acts == ["journalctl --rotate", *(f"systemctl --no-block try-restart -- {unit}" for unit in UNITS.split())]


def test_daemons_that_do_not_run_are_left_alone(tmp_path: Path) -> None:
    guest(tmp_path)
    programs, calls = manager(tmp_path, script='test "$1" != is-active')
    assert perform(machine_id.ACTION, prepared(tmp_path, programs=programs, systemd=True).context) == 0
    assert "restart" not in calls.read_text()


def test_a_journald_that_stays_with_the_old_id_is_a_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    guest(tmp_path)
    (tmp_path / f"run/log/journal/{OLD}").mkdir(parents=True)
    programs, _ = manager(tmp_path, script="exit 0")
    run = prepared(tmp_path, programs=programs, systemd=True, deadline_sec=3)
    assert perform(machine_id.ACTION, run.context) == 1
    assert "does not write under the new machine ID" in capsys.readouterr().err


def test_in_the_early_boot_nothing_is_waited_for(tmp_path: Path) -> None:
    guest(tmp_path)
    (tmp_path / f"run/log/journal/{OLD}").mkdir(parents=True)
    programs, calls = manager(tmp_path, script="exit 0")
    run = prepared(tmp_path, programs=programs, systemd=True, early=True)
    assert perform(machine_id.ACTION, run.context) == 0
    assert "journalctl" not in calls.read_text()


def test_killed_at_every_step_there_is_always_a_whole_id(tmp_path: Path) -> None:
    guest(tmp_path)
    write(tmp_path / "var/lib/dbus/machine-id", OLD + "\n")
    step = 1
    while killed_at_step(step, lambda: perform(machine_id.ACTION, prepared(tmp_path).context)):
        assert re.fullmatch(r"[0-9a-f]{32}", read(tmp_path))
        copy = tmp_path / "var/lib/dbus/machine-id"
        assert copy.is_symlink() or re.fullmatch(r"[0-9a-f]{32}\n", copy.read_text())
        step += 1
    assert step > 8
    assert read(tmp_path) != OLD
    assert (tmp_path / "var/lib/dbus/machine-id").is_symlink()
