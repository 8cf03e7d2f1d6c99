# SPDX-License-Identifier: Apache-2.0
"""A real chronyd, which does not control the clock (-x), understands what the clock action tells it."""

from __future__ import annotations

import subprocess

import pytest

from support.actions import in_namespaces
from support.tools import need, need_root

START = """
mount -t tmpfs none /run
mkdir -m 0750 /run/chrony
ip link set lo up
printf 'server 127.0.0.9 iburst\\ncmdport 0\\nbindcmdaddress /run/chrony/chronyd.sock\\npidfile /run/chronyd.pid\\n' \
    > /run/chrony.conf
chronyd -x -u root -f /run/chrony.conf
for i in $(seq 100); do test -S /run/chrony/chronyd.sock && break; sleep 0.1; done
"""

TELL = """
from vmfork.actions import ActionContext, Commands, clock
from vmfork.paths import Paths

paths = Paths("")
context = ActionContext(paths=paths, run=Commands(paths))
program = clock.chronyc(context)
print(program is not None)
clock.tell_chrony(context, program, clock.CHRONY_BEFORE + clock.CHRONY_AFTER)
"""


@pytest.fixture(autouse=True)
def _tools() -> None:
    need_root()
    need("chronyd", package="chrony")
    need("unshare", package="util-linux")


def guest(script: str) -> subprocess.CompletedProcess[str]:
    return in_namespaces(["--mount", "--net", "--pid", "--mount-proc"], START + script)


def test_chronyd_takes_every_command_that_it_is_told() -> None:
    done = guest(f"$PYTHON - <<'END'\n{TELL}\nEND")
    assert done.returncode == 0, done.stderr
    # Under -x a step is the one thing that chronyd cannot do; it still understood the request.
    allowed = ("told chronyd: makestep", "chronyd refused 'makestep': 500 Failure")
    found, makestep, *others = done.stdout.splitlines()
    assert (found, makestep in allowed) == ("True", True)
    assert others == ["told chronyd: reset sources", "told chronyd: burst 2/6"]


def test_without_chronyd_nobody_is_told() -> None:
    stop = "kill $(cat /run/chronyd.pid)\nwhile test -S /run/chrony/chronyd.sock; do sleep 0.1; done\n"
    done = guest(f"{stop}$PYTHON - <<'END'\n{TELL}\nEND")
    assert done.stdout == "False\n", done.stderr
