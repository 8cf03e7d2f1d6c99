# SPDX-License-Identifier: Apache-2.0
"""A guest that was powered off and whose disk is started again: as itself, as another copy, on another machine."""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from pathlib import Path

import pytest
from lab import view
from lab.clones import Clones, ready
from lab.guest import Guest, Saved
from lab.guests import Guests

pytest_plugins = ("lab.plugin",)
pytestmark = pytest.mark.vm

_FINGERPRINTS = "for key in /etc/ssh/ssh_host_*_key.pub; do ssh-keygen -lf $key; done"


@dataclass(frozen=True, slots=True, kw_only=True)
class Off:
    """A guest that is switched off: its disk, and who it was."""

    disk: Path
    guid: uuid.UUID
    smbios_uuid: uuid.UUID
    machine_id: str
    host_keys: str


@pytest.fixture(scope="module")
def off(guests: Guests, lab: Path, trixie: Saved) -> Off:
    """The Debian 13 guest, shut down in order."""
    assert trixie.guid
    assert trixie.smbios_uuid
    guest = trixie.restore("switched-off", guid=trixie.guid)
    machine_id = guest.check("cat", "/etc/machine-id")
    host_keys = guest.check("sh", "-c", _FINGERPRINTS)
    assert view.status(guest)["generation"] == 1
    guest.check("systemctl", "enable", "systemd-networkd")
    disk = guest.power_off()
    return Off(disk=disk, guid=trixie.guid, smbios_uuid=trixie.smbios_uuid, machine_id=machine_id, host_keys=host_keys)


def boot(spec_of: Saved, off: Off, clones: Clones, lab: Path, name: str, guid: uuid.UUID, machine: uuid.UUID) -> Guest:
    """Start the disk again; it is ready when this returns."""
    guest = Guest(spec_of.spec, name, lab, guid=guid, backing=off.disk, smbios_uuid=machine)
    clones.keep(guest)
    return ready(guest, probe=False)


def began(guest: Guest, unit: str) -> int:
    """When the start of a unit began, in microseconds since boot."""
    property_ = "InactiveExitTimestampMonotonic"
    microseconds = int(guest.check("systemctl", "show", f"--property={property_}", "--value", unit))
    assert microseconds, f"{unit} was not started"
    return microseconds


def assert_noticed_early(guest: Guest, event: view.Event) -> None:
    """The event is this guest's only one, cold, with the new ID, and older than network and sshd."""
    assert guest.generation_id is not None
    assert (event["kind"], event["generation"], event["state"]) == ("cold", 2, "settled"), event
    assert event["generation_id"] == guest.generation_id.hex()
    assert not view.failed_hooks(event)
    for unit in ("systemd-networkd.service", "ssh.service"):
        assert event["boottime_ns"] / 1000 < began(guest, unit), unit
    assert [one["kind"] for one in view.fence(guest)] == ["cold", "manual"]


def test_another_id_is_a_cold_fork_that_keeps_its_identity(trixie: Saved, off: Off, clones: Clones, lab: Path) -> None:
    guest = boot(trixie, off, clones, lab, "cold-id", uuid.uuid4(), off.smbios_uuid)
    event = view.wait_event(guest, after=1)
    assert_noticed_early(guest, event)
    assert event["identity"]["policy"] == "keep"
    assert guest.check("cat", "/etc/machine-id") == off.machine_id
    assert guest.check("sh", "-c", _FINGERPRINTS) == off.host_keys


def test_another_id_on_another_machine_is_a_clone_that_rotates(
    trixie: Saved, off: Off, clones: Clones, lab: Path
) -> None:
    guest = boot(trixie, off, clones, lab, "cold-machine", uuid.uuid4(), uuid.uuid4())
    event = view.wait_event(guest, after=1)
    assert_noticed_early(guest, event)
    assert event["identity"]["policy"] == "rotate"
    assert guest.check("cat", "/etc/machine-id") != off.machine_id
    old, new = off.host_keys.splitlines(), guest.check("sh", "-c", _FINGERPRINTS).splitlines()
    assert len(new) == len(old) > 0
    assert not set(new) & set(old)


def test_the_same_id_is_a_plain_boot(trixie: Saved, off: Off, clones: Clones, lab: Path) -> None:
    guest = boot(trixie, off, clones, lab, "cold-same", off.guid, off.smbios_uuid)
    assert [one["kind"] for one in view.fence(guest)] == ["manual"]
    assert guest.check("cat", "/etc/machine-id") == off.machine_id
