# SPDX-License-Identifier: Apache-2.0
"""A start on file systems that really have no room or take nothing, which strace only says of one call at a time.

Each play is a process in a mount namespace of its own, so it needs root.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from torture import plays
from torture.scenario import Scenario
from torture.starts import all_is_well, must_tell, settles
from torture.table import Row
from torture.verdict import judge


def full_run(scenario: Scenario) -> None:
    """After a boot /run has no room for a page: the start fails until there is some."""
    plays.clone_that_is_off(scenario)
    _put_on_run(scenario, size="128k")
    filler = _fill(f"{scenario.guest.root}/run/full")
    scenario.start()
    scenario.row.check(scenario.finish() == 1, "the start did not fail")
    filler.unlink()
    scenario.start()
    settles(scenario)
    all_is_well(scenario)


def run_that_fills_up(scenario: Scenario) -> None:
    """The page and the room for a note are there, but nothing new fits in: the fork is handled, and that is told."""
    _put_on_run(scenario, size="256k")
    plays.reaction_that_is_cut_off(scenario)
    filler = _fill(f"{scenario.guest.root}/run/full")
    scenario.start()
    settles(scenario)
    must_tell(scenario, "No space left")
    filler.unlink()
    all_is_well(scenario)


def read_only_var(scenario: Scenario) -> None:
    """/var takes nothing: the fork is handled, that is told, and what was missed is written when /var takes it."""
    plays.reaction_that_is_cut_off(scenario)
    var = f"{scenario.guest.root}/var"
    _mount("--bind", var, var)
    _mount("-o", "remount,bind,ro", var)
    scenario.start()
    settles(scenario)
    must_tell(scenario, "Read-only file system")
    _mount("-o", "remount,bind,rw", var)
    all_is_well(scenario)


PLAYS = {play.__name__: play for play in (full_run, run_that_fills_up, read_only_var)}


def _mount(*words: str) -> None:
    subprocess.run(["mount", *words], check=True)


def _put_on_run(scenario: Scenario, *, size: str) -> None:
    _mount("-t", "tmpfs", "-o", f"size={size},mode=755", "none", f"{scenario.guest.root}/run")
    os.mkdir(scenario.guest.paths.run_public, 0o755)
    os.mkdir(scenario.guest.paths.run_private, 0o700)


def _fill(path: str) -> Path:
    with open(path, "wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    return Path(path)


def play_file_system(name: str) -> Row:
    """One of these, in a namespace of its own."""
    command = ["unshare", "--mount", sys.executable, "-m", "torture.filesystems", name]
    places = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    run = subprocess.run(command, env=places, capture_output=True, text=True, check=False)
    if run.returncode:
        return Row(name=name, cases=1, violations=[f"{name}: {run.stderr}"])
    return Row(name=name, **json.loads(run.stdout))


def _whole(name: str) -> Callable[[Scenario], None]:
    def play(scenario: Scenario) -> None:
        try:
            PLAYS[name](scenario)
            judge(scenario)
        finally:
            # Else the guest's directory cannot be removed; a daemon that is still there is killed only after this.
            for place in ("run", "var"):
                command = ["umount", "--lazy", f"{scenario.guest.root}/{place}"]
                subprocess.run(command, stderr=subprocess.DEVNULL, check=False)

    return play


if __name__ == "__main__":
    played = Scenario(sys.argv[1], _whole(sys.argv[1]), lambda _scenario: None, may_fail=True).run()
    print(json.dumps({name: getattr(played, name) for name in ("cases", "sent", "seen", "hooks", "violations")}))
