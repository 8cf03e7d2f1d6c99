# SPDX-License-Identifier: Apache-2.0
"""What only a type checker looks at costs no program anything."""

from __future__ import annotations

import subprocess
import sys

import pytest

from support.runningdaemon import environment
from vmfork.settings import IDENTITY, Setting

# What the detector and the reactor have imported when they begin to wait for work.
_IMPORTS = {
    "detector": "import vmfork.daemon.__main__, vmfork.daemon.agent, vmfork.daemon.service",
    "reactor": "import vmfork.cli, vmfork.reactor.session",
    "library": "import vmfork; vmfork.Guard",
}


@pytest.mark.parametrize("program", _IMPORTS)
def test_does_not_load_typing(program: str) -> None:
    # In an interpreter of its own: this one has imported everything.
    code = f"import sys; before = set(sys.modules); {_IMPORTS[program]}; "
    done = subprocess.run(
        [sys.executable, "-c", code + "print({'typing', 'subprocess'} & set(sys.modules) - before)"],
        env=environment(),
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert done.stdout.strip() == "set()"


def test_a_class_of_something_is_that_class() -> None:
    assert Setting[float] is Setting


def test_the_stand_ins_give_no_attributes_to_what_has_slots() -> None:
    assert not hasattr(IDENTITY, "__dict__")
