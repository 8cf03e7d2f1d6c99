# SPDX-License-Identifier: Apache-2.0
"""x86 guests with systemd and an ACPI VM Generation ID, saved once and restored many times: Debian 13, Linux 6.12."""

from __future__ import annotations

import uuid
from collections.abc import Callable

import pytest
from lab import programs, view
from lab.clones import Clones
from lab.guest import Guest, Saved

pytest_plugins = ("lab.plugin",)
pytestmark = pytest.mark.vm

Measure = Callable[[Guest, view.Event], view.Event]

# Runs until the test lets it go, and says that it began.
_SLOW_HOOK = """#!/bin/sh
echo "$VMFORK_FORK_TOKEN" >>/run/lab-slow
until [ -e /run/lab-go ]; do sleep 0.2; done
"""
_MARK_HOOK = """#!/bin/sh
echo "$VMFORK_FORK_TOKEN" >>/run/lab-late
"""


def assert_is_the_fork(guest: Guest, event: view.Event, *, generation: int = 2) -> None:
    """The guest's own view of a live fork agrees with what its hypervisor was told."""
    expected = guest.generation_id
    assert expected is not None
    assert (event["generation"], event["kind"], event["state"]) == (generation, "live", "settled"), event
    assert event["generation_id"] == expected.hex()
    assert event["previous_generation_id"] != event["generation_id"]
    assert not view.failed_hooks(event)


def test_five_clones_of_one_snapshot_each_see_one_fork_and_differ(
    trixie: Saved, clones: Clones, measured: Measure
) -> None:
    tokens, drawn, by_programs = [], [], []
    saved = programs.start(clones.restore(trixie, "with-programs", guid=guid_of(trixie))).save()
    # No more at once than there are processors to emulate them.
    for names in (("one", "two"), ("three", "four"), ("five",)):
        for clone in [clones.restore(saved, f"clone-{name}", guid=uuid.uuid4()) for name in names]:
            event = measured(clone, view.wait_event(clone, after=1))
            assert_is_the_fork(clone, event)
            assert event["edges"] == ["kmsg"]
            assert event["detect_latency_us"] > 0
            tokens.append(event["token"])
            drawn.append(view.drawn(clone, 1))
            by_programs.append(programs.drawn(clone))
            assert [one["kind"] for one in view.fence(clone)] == ["live", "manual"]
            clone.pause()
    assert len(set(tokens)) == len(tokens) == 5
    for what in ("urandom", "uuid4", "random", "client_random"):
        assert len({str(one[what]) for one in drawn}) == 5, what
    assert len({one["shared"] for one in drawn}) == 1, "these are no clones of one state"
    programs.assert_clones_differ(by_programs)


def test_a_restore_with_the_same_id_is_no_fork(trixie: Saved, clones: Clones) -> None:
    clone = clones.restore(trixie, "same", guid=guid_of(trixie))
    # The hypervisor notified all the same; that much was seen.
    clone.until("grep", "-q", "^ *[1-9]", "/sys/firmware/acpi/interrupts/gpe05", what="the device's notification")
    assert [one["kind"] for one in view.fence(clone)] == ["manual"]


def test_a_fork_while_the_daemon_is_restarted_is_not_lost(trixie: Saved, clones: Clones, measured: Measure) -> None:
    first = clones.restore(trixie, "stopping", guid=guid_of(trixie))
    first.check("systemctl", "stop", "vmforkd")
    clone = clones.restore(first.save(), "stopped", guid=uuid.uuid4())
    clone.check("systemctl", "start", "vmforkd", timeout=120)
    event = measured(clone, view.wait_event(clone, after=1))
    assert_is_the_fork(clone, event)
    assert [one["kind"] for one in view.fence(clone)] == ["live", "manual"]


def test_a_fork_in_the_middle_of_a_reaction_supersedes_it(trixie: Saved, clones: Clones) -> None:
    first = clones.restore(trixie, "first-fork", guid=guid_of(trixie))
    view.put(first, "/etc/vmfork/hooks.d/01-lab-slow", _SLOW_HOOK, mode="0755")
    view.put(first, "/etc/vmfork/hooks.d/98-lab-late", _MARK_HOOK, mode="0755")
    second = clones.restore(first.save(), "reacting", guid=uuid.uuid4())
    second.until("test", "-s", "/run/lab-slow", seconds=120, what="the slow hook runs")
    assert view.status(second)["state"] == "reacting"
    clone = clones.restore(second.save(), "superseding", guid=uuid.uuid4())
    clone.until("sh", "-c", "test $(wc -l </run/lab-slow) -ge 2", seconds=120, what="the plan runs for the new fork")
    clone.check("touch", "/run/lab-go")
    newest = view.wait_event(clone, after=2)
    assert_is_the_fork(clone, newest, generation=3)
    superseded, listed = view.events(clone)
    assert (superseded["generation"], superseded["state"]) == (2, "superseded")
    assert listed["token"] == newest["token"]
    results = {one["name"]: one["result"] for one in superseded["hooks"]}
    assert results["01-lab-slow"] == "interrupted", results
    assert clone.check("cat", "/run/lab-slow").split() == [superseded["token"], newest["token"]]
    assert clone.check("cat", "/run/lab-late").split() == [newest["token"]]


def test_a_clone_of_a_clone_of_a_clone_counts_three_forks(trixie: Saved, clones: Clones, measured: Measure) -> None:
    saved, tokens = trixie, []
    for depth in (1, 2, 3):
        clone = clones.restore(saved, f"deep-{depth}", guid=uuid.uuid4())
        event = measured(clone, view.wait_event(clone, after=depth))
        assert_is_the_fork(clone, event, generation=depth + 1)
        tokens.append(event["token"])
        if depth < 3:
            saved = clone.save()
    assert view.status(clone)["generation"] == 4
    assert [one["token"] for one in view.events(clone)] == tokens


def guid_of(saved: Saved) -> uuid.UUID:
    """The generation ID that the saved guest had."""
    assert saved.guid is not None
    return saved.guid
