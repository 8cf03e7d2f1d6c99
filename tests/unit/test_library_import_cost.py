# SPDX-License-Identifier: Apache-2.0
"""What `import vmfork` costs a program that has nothing to do with it yet, and what a first guard adds.

Measured against a bare interpreter on the same machine; the bounds are far from what is measured, so that a busy
machine does not fail them, and near enough to notice a heavy module.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

import vmfork

HEAVY = {"asyncio", "ctypes", "dataclasses", "datetime", "inspect", "json", "logging", "socket", "ssl", "subprocess"}
AGENT = Path(vmfork.__file__).parents[1]


def run(program: str) -> str:
    """What a fresh interpreter prints, without the site packages of this environment."""
    with tempfile.TemporaryDirectory() as empty:
        environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(AGENT), "VMFORK_ROOT": empty}
        done = subprocess.run(
            [sys.executable, "-S", "-c", program], env=environment, capture_output=True, text=True, check=True
        )
    return done.stdout


def modules_after(program: str) -> set[str]:
    return set(run(f"import sys\n{program}\nprint(*sys.modules)").split())


def microseconds(statement: str) -> float:
    program = f"import time; begin = time.perf_counter()\n{statement}\nprint((time.perf_counter() - begin) * 1e6)"
    return min(float(run(program)) for _ in range(7))


def test_the_import_loads_nothing_but_itself() -> None:
    assert modules_after("import vmfork") - modules_after("") <= {"vmfork", "__future__"}


def test_the_import_takes_less_time_than_a_small_module_of_the_standard_library() -> None:
    run("import vmfork, json")
    assert microseconds("import vmfork") < microseconds("import json")


def test_the_import_takes_less_than_a_mebibyte() -> None:
    program = """
import re
def resident():
    return int(re.search(r"VmRSS:\\s+(\\d+) kB", open("/proc/self/status").read()).group(1))
resident(); before = resident()
import vmfork
print(resident() - before)
"""
    assert min(int(run(program)) for _ in range(5)) <= 1024


def test_a_first_guard_loads_nothing_heavy() -> None:
    loaded = modules_after("import vmfork; vmfork.Guard().forked()")
    assert not loaded & HEAVY
    assert "vmfork.varlink.client" not in loaded


def test_a_watcher_loads_nothing_of_the_daemon() -> None:
    loaded = modules_after("import vmfork; vmfork.Watcher; vmfork.register_after_fork; vmfork.reseed; vmfork.settled")
    assert not {name for name in loaded if name.startswith(("vmfork.daemon", "vmfork.edges", "vmfork.truths"))}
    assert not loaded & {"asyncio", "pyudev", "pyroute2", "systemd", "subprocess"}


@pytest.mark.parametrize("name", vmfork.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(vmfork, name).__doc__
    assert name in dir(vmfork)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="nonsense"):
        vmfork.nonsense  # noqa: B018
