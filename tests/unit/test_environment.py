# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
from pathlib import Path

import pytest

from support.hooks import TOKEN, Guest, occasion, run
from vmfork.reactor.environment import environment_of
from vmfork.reactor.phases import Occasion, Phase
from vmfork.reactor.process import Limits


def test_a_fork_sets_exactly_the_variables_of_the_contract(tmp_path: Path) -> None:
    assert environment_of(occasion(Guest(tmp_path)), "10-x", deadline_sec=30.0) == {
        "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "LANG": "C.UTF-8",
        "VMFORK_GENERATION": "7",
        "VMFORK_KIND": "live",
        "VMFORK_FORK_TOKEN": TOKEN.hex(),
        "VMFORK_EDGES": "kmsg timer",
        "VMFORK_IDENTITY": "rotate",
        "VMFORK_DRY_RUN": "0",
        "VMFORK_HOOK": "10-x",
        "VMFORK_DEADLINE_SEC": "30",
        "VMFORK_ROOT": str(tmp_path),
    }


def test_what_is_absent_is_unset() -> None:
    quiet = Occasion(phase=Phase.BEFORE_SNAPSHOT, generation=1, dry_run=True)
    names = set(environment_of(quiet, "10-x", deadline_sec=1.5))
    assert names == {
        "PATH",
        "LANG",
        "VMFORK_GENERATION",
        "VMFORK_DRY_RUN",
        "VMFORK_HOOK",
        "VMFORK_DEADLINE_SEC",
    }


def test_a_running_hook_sees_nothing_of_the_reactors_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LD_PRELOAD_SECRET", "s3cret")
    guest = Guest(tmp_path)
    guest.python_hook("10-env", f"import os; open('{tmp_path}/said', 'w').write('\\n'.join(sorted(os.environ)))")
    run(guest, limits=Limits(timeout_sec=20))
    said = set((tmp_path / "said").read_text().split())
    # Python itself coerces the locale and may add LC_CTYPE.
    assert said - {"LC_CTYPE"} == set(environment_of(occasion(guest), "10-env", deadline_sec=20))
    assert os.environ["LD_PRELOAD_SECRET"] not in (tmp_path / "said").read_text()
