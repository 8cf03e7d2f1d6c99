# SPDX-License-Identifier: Apache-2.0
"""x86 guests that differ: no device at all, a kernel without the driver, the newest kernel and QEMU, heavy load."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from pathlib import Path

import pytest
from lab import programs, view
from lab.clones import Clones, ready
from lab.guest import Guest, Saved
from lab.guests import Guests

pytest_plugins = ("lab.plugin",)
pytestmark = pytest.mark.vm

Measure = Callable[[Guest, view.Event], view.Event]


@pytest.fixture(scope="module")
def bookworm(guests: Guests, lab: Path) -> Saved:
    """A Debian 12 guest, whose cloud kernel 6.1 has no driver; saved while vmforkd polls and programs wait."""
    return programs.start(ready(Guest(guests.bookworm(), "bookworm", lab, guid=uuid.uuid4()))).save()


def test_without_a_device_nothing_is_noticed_and_doctor_says_so(guests: Guests, lab: Path, clones: Clones) -> None:
    guest = clones.keep(Guest(guests.trixie(vmgenid=False), "no-device", lab))
    saved = ready(guest, probe=False).save()
    clone = clones.restore(saved, "no-device-clone")
    assert [one["kind"] for one in view.fence(clone)] == ["manual"]
    assert view.status(clone)["detection"] == "none"
    doctor = clone.run("vmforkctl", "doctor")
    assert doctor.exit_code == 4
    assert "cannot notice" in doctor.stdout.splitlines()[0]


def test_without_a_driver_the_timer_notices_and_clones_differ(
    bookworm: Saved, clones: Clones, measured: Measure
) -> None:
    tokens, urandom, by_programs = [], [], []
    # No more at once than there are processors to emulate them.
    for names in (("one", "two"), ("three", "four"), ("five",)):
        for clone in [clones.restore(bookworm, f"timer-{name}", guid=uuid.uuid4()) for name in names]:
            event = measured(clone, view.wait_event(clone, after=1))
            assert clone.generation_id is not None
            assert (event["generation"], event["kind"], event["state"]) == (2, "live", "settled"), event
            assert event["edges"] == ["timer"]
            assert event["generation_id"] == clone.generation_id.hex()
            assert not view.failed_hooks(event)
            tokens.append(event["token"])
            urandom += view.drawn(clone, 1)["urandom"]
            by_programs.append(programs.drawn(clone))
            assert [one["kind"] for one in view.fence(clone)] == ["live", "manual"]
            clone.pause()
    assert len(set(tokens)) == 5
    assert len(set(urandom)) == len(urandom)
    programs.assert_clones_differ(by_programs)


def test_without_a_driver_the_kernel_hands_the_same_bytes_to_every_clone(bookworm: Saved, clones: Clones) -> None:
    """What vmfork repairs, shown where vmfork is stopped: else the test before this one would prove nothing."""
    assert bookworm.guid
    first = clones.restore(bookworm, "no-vmforkd", guid=bookworm.guid)
    first.check("systemctl", "stop", "vmforkd")
    saved = first.save()
    drawn = [
        set(view.drawn(clones.restore(saved, f"unrepaired-{number}", guid=uuid.uuid4()), "now")["urandom"])
        for number in range(2)
    ]
    assert drawn[0] & drawn[1]


def test_without_a_driver_doctor_says_why_only_the_timer_is_live(bookworm: Saved, clones: Clones) -> None:
    clone = clones.restore(bookworm, "doctor", guid=bookworm.guid)
    doctor = clone.run("vmforkctl", "doctor")
    assert doctor.exit_code == 0
    assert "linux-image-amd64" in doctor.stdout
    kmsg = view.source(clone, "kmsg", "edge")
    assert not kmsg["live"]
    assert kmsg["detail"]


def test_the_newest_kernel_with_a_vmclock_that_cannot_count_sees_one_fork(
    guests: Guests, lab: Path, clones: Clones, measured: Measure
) -> None:
    guest = clones.keep(Guest(guests.backports(), "backports", lab, guid=uuid.uuid4()))
    saved = ready(guest).save()
    clone = clones.restore(saved, "backports-clone", guid=uuid.uuid4())
    event = measured(clone, view.wait_event(clone, after=1))
    assert clone.generation_id is not None
    assert event["generation_id"] == clone.generation_id.hex()
    assert (event["edges"], event["kind"], event["state"]) == (["kmsg"], "live", "settled"), event
    assert [one["kind"] for one in view.fence(clone)] == ["live", "manual"]
    for role, why in (("edge", "notifications"), ("truth", "counter")):
        vmclock = view.source(clone, "vmclock", role)
        assert not vmclock["live"]
        assert why in vmclock["detail"], vmclock["detail"]


def test_a_busy_guest_with_two_processors_sees_one_fork(
    guests: Guests, lab: Path, clones: Clones, measured: Measure
) -> None:
    guest = clones.keep(Guest(guests.trixie(processors=2), "busy", lab, guid=uuid.uuid4()))
    ready(guest, probe=False)
    guest.check("systemd-run", "stress-ng", "--cpu=2", "--vm=1", "--vm-bytes=64M", "--switch=1", timeout=120)
    guest.until("sh", "-c", "test $(pgrep -c stress-ng) -gt 4", seconds=120, what="the load began")
    clone = clones.restore(guest.save(), "busy-clone", guid=uuid.uuid4())
    event = measured(clone, view.wait_event(clone, after=1, timeout=300))
    assert clone.generation_id is not None
    assert event["generation_id"] == clone.generation_id.hex()
    assert (event["generation"], event["kind"], event["edges"]) == (2, "live", ["kmsg"])
    assert event["detect_latency_us"] > 0
    assert [one["kind"] for one in view.fence(clone)] == ["live", "manual"]
