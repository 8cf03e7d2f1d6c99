# SPDX-License-Identifier: Apache-2.0
"""arm64 guests with a devicetree: VM Generation ID alone, with a vmclock that counts, and a vmclock alone."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest
from lab import view
from lab.board import Board
from lab.clones import Clones, ready
from lab.guest import Guest
from lab.guests import Guests

pytest_plugins = ("lab.plugin",)
pytestmark = pytest.mark.vm

Measure = Callable[[Guest, view.Event], view.Event]

_IN_A_ROW = 20


def board_of(guest: Guest) -> Board:
    """The hypervisor behind an arm64 guest."""
    assert guest.board is not None
    return guest.board


def await_interrupts(guest: Guest, name: str, count: int) -> None:
    """Wait until the guest's kernel has taken this many interrupts of a device."""
    script = (
        'awk -v name="$1" -v count="$2" \'$NF == name { seen = $2 } END { exit !(seen >= count) }\' /proc/interrupts'
    )
    guest.until("sh", "-c", script, "interrupts", name, str(count), what=f"{count} interrupts of {name}")


def forks_in_a_row(guest: Guest, count: int, measured: Measure) -> None:
    """So many forks, each awaited; the reaction to the last one too, and it succeeded."""
    for generation in range(1, count + 1):
        board_of(guest).fork(os.urandom(16))
        view.wait_generation(guest, generation + 1)
    last = measured(guest, view.wait_event(guest, after=count))
    assert (last["generation"], last["state"]) == (count + 1, "settled"), last
    assert not view.failed_hooks(last)


def forks_before_the_fence(guest: Guest) -> list[view.Event]:
    """All forks so far, oldest first, and nothing that came with the fence but the fence."""
    *forks, fence = view.fence(guest)
    assert fence["kind"] == "manual"
    assert {one["kind"] for one in forks} <= {"live"}
    assert [one["generation"] for one in forks] == list(range(2, len(forks) + 2))
    assert len({one["token"] for one in forks}) == len(forks)
    return forks


def test_twenty_changes_in_a_row_are_twenty_forks(guests: Guests, lab: Path, clones: Clones, measured: Measure) -> None:
    guest = clones.keep(Guest(guests.arm64(), "vmgenid", lab))
    ready(guest, probe=False)
    forks_in_a_row(guest, _IN_A_ROW, measured)
    forks = forks_before_the_fence(guest)
    assert [one["edges"] for one in forks] == [["kmsg"]] * _IN_A_ROW


def test_a_notification_without_a_change_is_no_fork(guests: Guests, lab: Path, clones: Clones) -> None:
    guest = ready(clones.keep(Guest(guests.arm64(), "unchanged", lab)), probe=False)
    board_of(guest).fork(board_of(guest).generation_id)
    await_interrupts(guest, "vmgenid", 1)
    assert [one["kind"] for one in view.fence(guest)] == ["manual"]


def test_two_edges_of_one_fork_are_one_event_and_a_disruption_is_none(
    guests: Guests, lab: Path, clones: Clones, measured: Measure
) -> None:
    guest = clones.keep(Guest(guests.arm64(backports=True, vmclock=True), "both", lab))
    ready(guest, probe=False)
    forks_in_a_row(guest, 3, measured)
    await_interrupts(guest, "vmgenid", 3)
    await_interrupts(guest, "vmclock", 3)
    board_of(guest).disrupt()
    await_interrupts(guest, "vmclock", 4)
    forks = forks_before_the_fence(guest)
    assert len(forks) == 3
    assert all(set(one["edges"]) <= {"kmsg", "vmclock"} for one in forks)
    for role in ("edge", "truth"):
        assert view.source(guest, "vmclock", role)["live"]


def test_a_vmclock_alone_tells_of_forks_by_its_poll(
    guests: Guests, lab: Path, clones: Clones, measured: Measure
) -> None:
    guest = clones.keep(Guest(guests.arm64(backports=True, vmgenid=False, vmclock=True), "vmclock", lab))
    ready(guest, probe=False)
    forks_in_a_row(guest, 3, measured)
    board_of(guest).disrupt()
    await_interrupts(guest, "vmclock", 4)
    forks = forks_before_the_fence(guest)
    assert [one["edges"] for one in forks] == [["vmclock"]] * 3


def test_restored_clones_on_a_devicetree_differ(guests: Guests, lab: Path, clones: Clones, measured: Measure) -> None:
    base = clones.keep(Guest(guests.arm64(), "base", lab, guid=uuid.uuid4()))
    saved = ready(base).save()
    tokens, drawn = [], []
    for name in ("one", "two"):
        clone = clones.restore(saved, f"clone-{name}", guid=uuid.uuid4())
        event = measured(clone, view.wait_event(clone, after=1))
        assert (event["generation"], event["edges"], event["state"]) == (2, ["kmsg"], "settled"), event
        tokens.append(event["token"])
        drawn.append(view.drawn(clone, 1))
    assert len(set(tokens)) == 2
    assert drawn[0]["shared"] == drawn[1]["shared"]
    for what in ("urandom", "uuid4", "random", "client_random"):
        assert drawn[0][what] != drawn[1][what], what
