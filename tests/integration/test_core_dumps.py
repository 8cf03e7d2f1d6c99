# SPDX-License-Identifier: Apache-2.0
"""Whatever crashes, and however generous the limits are: no core dump holds a generation ID."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from support.tools import need
from torture.liveguest import LiveGuest

# A process that holds an ID, as a control: what it leaves shows that this machine would keep a core.
_HOLDER = "import os, signal, sys; kept = bytes.fromhex(sys.argv[1]); os.kill(os.getpid(), signal.SIGSEGV)"
# Says what the reactor, its parent, may leave.
_ASK = 'grep "core file" /proc/$PPID/limits >"$VMFORK_ROOT/limit"; echo "$VMFORK_GENERATION" >>"$VMFORK_ROOT/ran"'


def generous(directory: Path) -> list[str]:
    """What comes before a command so that its core would lie in this directory."""
    directory.mkdir()
    return ["env", "-C", str(directory), need("prlimit", package="util-linux"), "--core=unlimited"]


@pytest.fixture(autouse=True)
def _cores_are_files() -> None:
    pattern = Path("/proc/sys/kernel/core_pattern").read_text().strip()
    if not pattern or pattern[0] in "|/@":
        # For a pipe there is a test in a virtual machine, whose pattern may be changed.
        pytest.skip(f"core_pattern is {pattern!r}: cores do not come to the working directory")


def test_this_machine_keeps_cores_with_what_was_in_memory(tmp_path: Path) -> None:
    value = bytes(range(100, 116))
    words = [*generous(tmp_path / "cwd"), sys.executable, "-c", _HOLDER, value.hex()]
    assert subprocess.run(words, check=False).returncode == -signal.SIGSEGV
    (core,) = (tmp_path / "cwd").iterdir()
    assert value in core.read_bytes()


def test_a_detector_that_crashes_leaves_no_core(tmp_path: Path) -> None:
    with LiveGuest("guest") as live:
        live.words = [*generous(tmp_path / "cwd"), *live.words]
        live.start()
        value = live.fork()
        live.until(lambda: live.is_written(2, value), "the fork settled")
        assert live.process is not None
        live.process.send_signal(signal.SIGSEGV)
        assert live.process.wait(20) == -signal.SIGSEGV
    assert list((tmp_path / "cwd").iterdir()) == []


def test_a_reactor_has_the_limit_of_its_detector(tmp_path: Path) -> None:
    # Its core would lie in the root directory of this machine: only its limit is looked at.
    with LiveGuest("guest", hook=_ASK) as live:
        live.words = [*generous(tmp_path / "cwd"), *live.words]
        live.start()
        value = live.fork()
        live.until(lambda: live.is_written(2, value), "the fork settled")
        assert (live.guest.root / "limit").read_text().split() == ["Max", "core", "file", "size", "1", "1", "bytes"]
