# SPDX-License-Identifier: Apache-2.0
"""Clones of a running guest on one virtual switch with one DHCP server, under systemd-networkd and NetworkManager.

The guest is booted once and saved twice while it runs: as an ordinary member of its network, and as a template that
`vmforkctl prepare --template` declared. QEMU restores a network card with the MAC address that the guest had, as other
hypervisors do for a guest that is running, so the template's configuration names the interface for 35-mac-address.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from lab import lan as network
from lab import view
from lab.clones import ARTIFACTS, Clones, ready
from lab.deadline import until
from lab.guest import Guest, Saved
from lab.guests import Guests
from lab.switch import MAC, SERVER, Switch, missing, switch

from support.tools import need, unavailable

pytest_plugins = ("lab.plugin",)
pytestmark = pytest.mark.vm

Measure = Callable[[Guest, view.Event], view.Event]

# Three emulated guests on two processors make RSA keys for longer than a hook usually has.
_CONFIGURATION = """[React]
TimeoutSec=300

[Hook 35-mac-address]
Interfaces=eth0

[Hook 40-leases]
WaitSec=60
"""
# Identifiers that NetworkManager derives from its secret key and the machine ID, not from the MAC address.
_NM_CONNECTION = """[connection]
id=lan
type=ethernet
interface-name=eth0

[ipv4]
method=auto
dhcp-client-id=stable

[ipv6]
method=link-local
addr-gen-mode=stable-privacy
"""
# Keeps a reaction at its beginning until the test lets it go.
_HOLD = "/run/vmfork-lab.hold"
_HOLD_HOOK = f"""#!/bin/sh
[ "$1" = after-fork ] || exit 0
while [ -e {_HOLD} ]; do sleep 0.2; done
"""
_IDENTITY_HOOKS = ("20-machine-id", "25-ssh-host-keys", "35-mac-address")


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Who a guest is to its network, by its own view."""

    machine_id: str
    host_key: str
    mac: str
    address: str
    link_local: str
    client_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Moments:
    """One guest, saved while it ran, and who it was then. The original keeps its lease at the server."""

    member: Saved
    template: Saved
    was: Machine


@pytest.fixture(scope="module")
def lan(lab: Path) -> Iterator[Switch]:
    """The switch and its DHCP server."""
    need("ssh-keyscan", package="openssh-client")
    if reason := missing():
        unavailable(reason)
    with switch(lab / "lan") as made:
        yield made


@pytest.fixture(scope="module")
def moments(guests: Guests, lab: Path, lan: Switch) -> Moments:
    """The guest, booted once."""
    spec = lan.connected(guests.trixie())
    guest = ready(Guest(spec, "lan-guest", lab, guid=uuid.uuid4(), smbios_uuid=uuid.uuid4()), probe=False)
    try:
        view.put(guest, "/etc/vmfork/vmfork.conf.d/50-lab.conf", _CONFIGURATION)
        view.put(guest, "/etc/vmfork/hooks.d/02-lab-hold", _HOLD_HOOK, mode="0755")
        guest.check("vmforkctl", "reload")
        network.join(guest)
        guest.until("sh", "-c", "ip -6 -o addr show dev eth0 scope link | grep -qv tentative", what="IPv6 is settled")
        was = machine(guest)
        member = guest.save(go_on=True)
        guest.check("vmforkctl", "prepare", "--template")
        guest.check("touch", _HOLD)
        template = guest.save()
    except BaseException:
        guest.report(ARTIFACTS / "boot-lan-guest")
        guest.kill()
        raise
    return Moments(member=named(member, "renewing a lease"), template=template, was=was)


@pytest.fixture(scope="module")
def managed(moments: Moments) -> Moments:
    """The same guest with NetworkManager in the place of systemd-networkd."""
    guest = moments.member.restore("managed", guid=moments.member.guid)
    try:
        guest.check("sh", "-ec", 'for deb in /srv/archive/*.deb; do dpkg-deb -x "$deb" /; done', timeout=180)
        view.put(guest, "/etc/NetworkManager/system-connections/lan.nmconnection", _NM_CONNECTION, mode="0600")
        # These clones are about their addresses; the other hooks were shown, and would take most of the time.
        network.mask_all_but(guest, "20-machine-id", "35-mac-address", "40-leases")
        networkd = ("systemd-networkd.socket", "systemd-networkd.service")
        guest.check("systemctl", "disable", "--now", *networkd, timeout=120)
        guest.check("ip", "address", "flush", "dev", "eth0")
        guest.check("busctl", "call", "org.freedesktop.DBus", "/", "org.freedesktop.DBus", "ReloadConfig")
        guest.check("systemctl", "daemon-reload", timeout=120)
        guest.check("systemctl", "start", "NetworkManager.service", timeout=180)
        guest.until("sh", "-c", "nmcli -g DHCP4 device show eth0 | grep -q client_identifier", what="a lease")
        was = machine(guest, managed=True)
        member = guest.save(go_on=True)
        guest.check("vmforkctl", "prepare", "--template")
        template = guest.save()
    except BaseException:
        guest.report(ARTIFACTS / "network-manager")
        guest.kill()
        raise
    return Moments(
        member=named(member, "NetworkManager, renewing"), template=named(template, "NetworkManager"), was=was
    )


def named(saved: Saved, what: str) -> Saved:
    """The same saved guest, under a name of its own in the table of latencies."""
    return replace(saved, spec=replace(saved.spec, name=f"{saved.spec.name.partition(',')[0]}, {what}"))


def machine(guest: Guest, *, managed: bool = False) -> Machine:
    """Ask a guest, `managed` by NetworkManager or not, who it is; it has exactly one address of each kind."""
    show = "ip -o addr show dev eth0"
    (address,) = (line.split()[3] for line in guest.check("sh", "-c", f"{show} | grep -w inet").splitlines())
    (link_local,) = (line.split()[3] for line in guest.check("sh", "-c", f"{show} | grep -w inet6").splitlines())
    if managed:
        options = guest.check("nmcli", "-e", "no", "-g", "DHCP4", "device", "show", "eth0")
        client_id = re.search(r"dhcp_client_identifier = ([0-9a-f:]+)", options)
    else:
        client_id = re.search("^CLIENTID=(.*)$", guest.check("cat", "/run/systemd/netif/leases/2"), re.MULTILINE)
    assert client_id
    return Machine(
        machine_id=guest.check("cat", "/etc/machine-id").strip(),
        host_key=guest.check("cut", "-d ", "-f1,2", "/etc/ssh/ssh_host_ed25519_key.pub").strip(),
        mac=guest.check("cat", "/sys/class/net/eth0/address").strip(),
        address=address.partition("/")[0],
        link_local=link_local.partition("/")[0],
        client_id=client_id[1],
    )


def presented(scan: str) -> set[str]:
    """The host keys in the output of ssh-keyscan."""
    return {" ".join(line.split()[1:3]) for line in scan.splitlines() if not line.startswith("#")}


def key_seen_from_outside(lan: Switch, address: str) -> str:
    """The host key that a neighbour is shown at an address."""

    def scan() -> str:
        return lan.run("ssh-keyscan", "-T", "20", "-t", "ed25519", address, seconds=60).stdout

    (key,) = presented(until(lambda: scan().strip(), seconds=120, what=f"an sshd answers at {address}"))
    return key


def test_three_clones_of_a_template_collide_and_end_as_three_machines(
    moments: Moments, lan: Switch, clones: Clones
) -> None:
    trio = [clones.restore(moments.template, f"clone-{number}", guid=uuid.uuid4()) for number in (1, 2, 3)]
    for clone in trio:
        view.wait_generation(clone, 2, seconds=120)

    # Each has noticed, none has reacted yet: three times the same machine, and the network sees them all at once.
    assert {machine(clone) for clone in trio} == {moments.was}
    lan.forget()
    assert len(lan.claimants(moments.was.address, at_least=3)) == 3
    assert len(lan.seen().macs[MAC]) == 3

    # Where clones spread their requests, another hook than otherwise restarts networkd.
    view.put(trio[-1], "/etc/vmfork/vmfork.conf.d/60-spread.conf", "[React]\nSpreadSec=5\n")
    for clone in trio:
        clone.check("rm", _HOLD)
    for clone in trio:
        event = view.wait_event(clone, after=1, timeout=400)
        assert not view.failed_hooks(event)
        assert (event["state"], event["identity"]["policy"]) == ("settled", "rotate")
        results = {one["name"]: one["result"] for one in event["hooks"]}
        assert {results[name] for name in (*_IDENTITY_HOOKS, "40-leases", "45-neighbours")} == {"ok"}
    # That one is still the original's.
    assert f"DHCPRELEASE(lan) {moments.was.address}" not in lan.logged()

    now = [machine(clone) for clone in trio]
    for what in ("machine_id", "host_key", "mac", "address", "link_local", "client_id"):
        values = {getattr(one, what) for one in (*now, moments.was)}
        assert len(values) == 4, f"{what} is shared: {values}"

    lan.forget()
    ports = [lan.claimants(one.address, at_least=1) for one in now]
    assert sorted(port for claimed in ports for port in claimed) == sorted({port for (port,) in ports})
    assert {one.mac: lan.seen().macs[one.mac] for one in now} == {
        one.mac: claimed for one, claimed in zip(now, ports, strict=True)
    }
    assert MAC not in lan.seen().macs
    assert [key_seen_from_outside(lan, one.address) for one in now] == [one.host_key for one in now]
    for clone, own in zip(trio, now, strict=True):
        for other in now:
            if other is not own:
                reach(clone, other)


def reach(guest: Guest, other: Machine) -> None:
    """The guest pings the other machine by both its addresses, and is shown its host key over TCP."""
    guest.until("busybox", "ping", "-c", "1", "-W", "10", other.address)
    guest.until("busybox", "ping", "-6", "-c", "1", "-W", "10", f"{other.link_local}%eth0")
    scan = guest.until("sh", "-c", 'ssh-keyscan -T 20 -t ed25519 "$1" | grep .', "scan", other.address)
    assert presented(scan.stdout) == {other.host_key}


def test_a_rollback_keeps_its_identity_and_renews_its_lease(
    moments: Moments, lan: Switch, clones: Clones, measured: Measure
) -> None:
    logged = len(lan.logged())
    guest = clones.restore(moments.member, "rolled-back", guid=uuid.uuid4())
    event = measured(guest, view.wait_event(guest, after=1))
    assert (event["state"], event["identity"]["policy"]) == ("settled", "keep")
    results = {one["name"]: one["result"] for one in event["hooks"]}
    assert {results[name] for name in _IDENTITY_HOOKS} == {"skipped"}
    assert {results[name] for name in ("40-leases", "45-neighbours")} == {"ok"}
    assert machine(guest) == moments.was
    words = lan.logged()[logged:]
    assert f"DHCPACK(lan) {moments.was.address} {MAC}" in words
    assert "DHCPDISCOVER" not in words
    assert "DHCPRELEASE" not in words
    guest.check("busybox", "ping", "-c", "3", "-W", "10", SERVER)


def test_two_clones_of_a_template_under_network_manager_end_as_two_machines(
    managed: Moments, lan: Switch, clones: Clones, measured: Measure
) -> None:
    pair = [clones.restore(managed.template, f"managed-{number}", guid=uuid.uuid4()) for number in (1, 2)]
    for clone in pair:
        event = measured(clone, view.wait_event(clone, after=1, timeout=400))
        assert (event["state"], event["identity"]["policy"]) == ("settled", "rotate")
        results = {one["name"]: one["result"] for one in event["hooks"]}
        assert {results[name] for name in ("20-machine-id", "35-mac-address", "40-leases")} == {"ok"}

    now = [machine(clone, managed=True) for clone in pair]
    for what in ("machine_id", "mac", "address", "link_local", "client_id"):
        values = {getattr(one, what) for one in (*now, managed.was)}
        assert len(values) == 3, f"{what} is shared: {values}"
    # What arrived at the server: expiry, MAC address, address, name, client identifier.
    leased = {line.split()[2]: line.split() for line in lan.leases.read_text().splitlines()}
    assert [(leased[one.address][1], leased[one.address][4]) for one in now] == [
        (one.mac, one.client_id) for one in now
    ]
    secrets = {clone.check("sha256sum", "/var/lib/NetworkManager/secret_key") for clone in pair}
    assert len(secrets) == 2
    pair[0].until("busybox", "ping", "-c", "1", "-W", "10", now[1].address)


def test_a_rollback_under_network_manager_keeps_its_identity_and_renews_its_lease(
    managed: Moments, lan: Switch, clones: Clones, measured: Measure
) -> None:
    logged = len(lan.logged())
    guest = clones.restore(managed.member, "managed-back", guid=uuid.uuid4())
    event = measured(guest, view.wait_event(guest, after=1, timeout=400))
    assert (event["state"], event["identity"]["policy"]) == ("settled", "keep")
    assert {one["name"]: one["result"] for one in event["hooks"]}["40-leases"] == "ok"
    assert machine(guest, managed=True) == managed.was
    words = lan.logged()[logged:]
    assert f"DHCPACK(lan) {managed.was.address} {MAC}" in words
    assert "DHCPRELEASE" not in words
