# SPDX-License-Identifier: Apache-2.0
"""Python programs that run in a guest before it is saved, and what their copies in the clones drew after the fork.

The host's side of `guest_programs.py`: it starts them, collects what they drew, and holds the clones of one program
against each other.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lab import view
from lab.guest import Guest

_SOURCE = Path(__file__).with_name("guest_programs.py")
_PROGRAM = "/run/vmfork-lab.programs.py"
_DRAWN = "/run/vmfork-lab.programs"

# What a process keeps for itself, so that its copies go on with it; the rest comes from the kernel.
_STATE = ("random", "gauss", "tempfile", "openssl")
_KINDS = ("plain", "threaded", "pool", "asyncio")

# Program: "before" or "after" the fork: who drew in it: what: the value.
Drawn = dict[str, dict[str, dict[str, dict[str, str]]]]


def start(guest: Guest) -> Guest:
    """Start all programs and wait until they have drawn and wait for a fork."""
    view.put(guest, _PROGRAM, _SOURCE.read_text())
    command = f"setsid python3 -W ignore {_PROGRAM} {_DRAWN} >{_DRAWN}.log 2>&1 </dev/null &"
    guest.check("sh", "-c", command)
    guest.until("test", "-e", f"{_DRAWN}.ready", seconds=120, what="the programs wait for a fork")
    return guest


def drawn(guest: Guest) -> Drawn:
    """What each program drew before and after the fork; waits for it."""
    guest.until("test", "-e", _DRAWN, seconds=120, what="all programs have drawn after the fork")
    answer = guest.json("cat", _DRAWN)
    assert isinstance(answer, dict)
    return answer


def assert_clones_differ(clones: list[Drawn]) -> None:
    """They are clones of the same programs; those that were reseeded share nothing any more, the others still do."""
    for program in clones[0]:
        assert all(one[program]["before"] == clones[0][program]["before"] for one in clones), f"no clones: {program}"
    for kind in _KINDS:
        _assert_equal_state([one[f"{kind}, as it was"]["after"] for one in clones], kind)
    reseeded: list[dict[str, str]] = []
    for kind in _KINDS:
        for one in clones:
            reseeded += one[f"{kind}, reseeded"]["after"].values()
        reseeded += clones[0][f"{kind}, reseeded"]["before"].values()
    assert_no_two_equal(reseeded)
    for one in clones:
        assert len(one["pool, reseeded"]["after"]) == 2, "not each worker has drawn"


def assert_no_two_equal(draws: list[dict[str, Any]]) -> None:
    """All clones, programs, threads, workers and tasks have drawn something else, whatever it was."""
    for what in draws[0]:
        values = [one[what] for one in draws]
        assert len(set(values)) == len(values), f"{what}: {sorted(values)}"


def _assert_equal_state(after: list[dict[str, dict[str, str]]], kind: str) -> None:
    """What nobody reseeds is equal in all clones: else the programs that are reseeded would prove nothing."""
    for who, first in after[0].items():
        for what in _STATE:
            values = {one[who][what] for one in after}
            assert values == {first[what]}, f"{kind}, {who}, {what} differs without any help: {values}"
