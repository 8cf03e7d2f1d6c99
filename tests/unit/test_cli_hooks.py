# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from support.hooks import Guest
from support.tools import need_ptrace
from torture.injection import Injection, strace

SHORT_FORM = '#!/bin/sh\nexec vmforkctl action {} "$@"\n'


@pytest.fixture
def guest(tmp_path: Path) -> Guest:
    guest = Guest(tmp_path)
    guest.hook("10-rng", SHORT_FORM.format("rng"), directory=guest.lib)
    guest.hook("20-machine-id", SHORT_FORM.format("machine-id"), directory=guest.lib)
    return guest


def vmforkctl(guest: Guest, *arguments: str, launcher: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": ":".join(sys.path)}
    command = [*launcher, sys.executable, "-m", "vmfork", "--root", str(guest.root), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=60)


def test_hooks_lists_every_entry_as_json(guest: Guest) -> None:
    (guest.etc / "10-rng").symlink_to("/dev/null")
    listed = json.loads(vmforkctl(guest, "hooks", "--json=short").stdout)
    assert [(one["name"], one["origin"], one["enabled"]) for one in listed] == [
        ("10-rng", "etc", False),
        ("20-machine-id", "lib", True),
    ]
    assert set(listed[0]) == {"name", "path", "order", "origin", "enabled", "reason"}


def test_hooks_tells_a_person_the_cure(guest: Guest) -> None:
    path = guest.hook("40-mine", "", mode=0o777)
    told = vmforkctl(guest, "hooks")
    assert told.returncode == 0
    assert f"hint: chmod go-w {path}" in told.stderr


@pytest.mark.parametrize("verb", ["hooks", "plan"])
def test_a_directory_that_cannot_be_read_is_named_and_is_no_empty_one(guest: Guest, verb: str) -> None:
    need_ptrace()
    broken = Injection(call="getdents64", when="1+", fault="error=EIO", path=str(guest.etc))
    told = vmforkctl(guest, verb, launcher=strace(injections=[broken]))
    assert (told.returncode, told.stdout) == (1, "")
    assert f"{guest.etc}: cannot be read: Input/output error" in told.stderr


@pytest.mark.parametrize(("asked", "runs"), [("rotate", True), ("keep", False), ("auto", False)])
def test_plan_shows_what_the_identity_policy_leaves_out(guest: Guest, asked: str, runs: bool) -> None:
    planned = json.loads(vmforkctl(guest, "plan", f"--identity={asked}", "--json=short").stdout)
    enabled = {one["name"]: one["enabled"] for one in planned}
    assert enabled == {"10-rng": True, "20-machine-id": runs}


def test_a_rehearsal_runs_the_packages_hooks_and_names_the_others(guest: Guest) -> None:
    path = guest.hook("41-mine", f"touch {guest.root}/ran")
    told = vmforkctl(guest, "react", "--dry-run")
    assert told.returncode == 0, told.stderr
    assert f"would run {path}" in told.stdout
    assert "10-rng" in told.stdout
    assert not (guest.root / "ran").exists()


def test_react_without_a_daemon_says_so(guest: Guest) -> None:
    told = vmforkctl(guest, "react")
    assert told.returncode == 3
    assert "hint: is vmforkd running?" in told.stderr
