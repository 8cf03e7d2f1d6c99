# SPDX-License-Identifier: Apache-2.0
"""Hook 70-services with a service manager that is a script: what it is asked, and what is made of its answers."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.actions import Run, prepared
from vmfork import values
from vmfork.actions import perform, services

SYSTEMCTL = """#!/bin/sh
echo "$@" >> {top}/calls
case "$*" in
*try-restart*) touch {top}/restarted ;;
show*)
    shift
    while [ "$1" != -- ]; do shift; done
    shift
    for unit in "$@"; do
        invocation=1
        active=active
        can=yes
        [ -e {top}/restarted ] && [ ! -e {top}/stubborn ] && invocation=2
        [ "$unit" = stopped.service ] && active=inactive
        [ "$unit" = deaf.service ] && can=no
        [ "$unit" = broken.service ] && [ -e {top}/restarted ] && active=failed
        printf 'Id=%s\\nActiveState=%s\\nSubState=running\\nInvocationID=%s\\nJob=0\\n' "$unit" $active $invocation
        printf 'CanReload=%s\\nReloadResult=success\\n\\n' $can
    done ;;
esac
"""


def act(top: Path, *, dry_run: bool = False, early: bool = False, **keys: str) -> tuple[int, Run, list[str]]:
    programs = top / "bin"
    programs.mkdir()
    stub = programs / "systemctl"
    stub.write_text(SYSTEMCTL.format(top=top))
    stub.chmod(0o755)
    (top / "calls").touch()
    run = prepared(top, settings=keys, dry_run=dry_run, early=early, systemd=True, programs=programs)
    code = perform(services.ACTION, run.context)
    calls = [line for line in (top / "calls").read_text().splitlines() if not line.startswith("show")]
    return code, run, calls


def test_running_units_are_restarted_and_reloaded(tmp_path: Path) -> None:
    code, run, calls = act(tmp_path, Restart="one two.socket", Reload="three one")
    assert code == 0
    assert calls == ["--no-block try-restart -- one.service two.socket", "--no-block reload -- three.service"]
    assert "one.service: restarted, running" in run.said
    assert "three.service: reloaded, running" in run.said


def test_a_stopped_unit_stays_stopped(tmp_path: Path) -> None:
    code, run, calls = act(tmp_path, Restart="stopped one")
    assert code == 0
    assert calls == ["--no-block try-restart -- one.service"]
    assert "stopped.service is inactive: left alone" in run.said


def test_a_unit_that_does_not_come_up_again_is_a_failure(tmp_path: Path) -> None:
    code, run, _ = act(tmp_path, Restart="broken one")
    assert code == 1
    assert "broken.service: is failed (running)" in run.said
    assert "one.service: restarted" in run.said


def test_a_restart_that_did_not_happen_is_a_failure(tmp_path: Path) -> None:
    (tmp_path / "stubborn").touch()
    code, run, _ = act(tmp_path, Restart="one")
    assert code == 1
    assert "one.service: was not restarted" in run.said


def test_a_unit_that_cannot_be_reloaded_does_not_keep_the_others_from_it(tmp_path: Path) -> None:
    code, _, calls = act(tmp_path, Reload="deaf one")
    assert code == 1
    assert calls == ["--no-block reload -- one.service"]


def test_a_dry_run_asks_for_nothing(tmp_path: Path) -> None:
    code, run, calls = act(tmp_path, dry_run=True, Restart="one", Reload="two")
    assert code == 0
    assert calls == []
    assert run.lines == ["would restart one.service", "would reload two.service"]


def test_in_the_early_boot_nothing_is_asked(tmp_path: Path) -> None:
    code, _, calls = act(tmp_path, early=True, Restart="one")
    assert code == 77
    assert calls == []


def test_without_configuration_it_is_skipped(tmp_path: Path) -> None:
    assert act(tmp_path)[0] == 77


@pytest.mark.parametrize(
    "name", ["--force", "-H root@host", "a b/c", "x;reboot", "$(id)", "é.service", "../x", ".a\n-b"]
)
def test_what_is_no_unit_name_is_never_passed_on(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="names of systemd units"):
        values.units(name)
    code, _, calls = act(tmp_path, Restart=name)
    assert code == 77
    assert calls == []


def test_templates_and_escapes_are_unit_names() -> None:
    assert values.units(r"getty@tty1 dev-disk\x2dby.swap") == ("getty@tty1.service", r"dev-disk\x2dby.swap")
