# SPDX-License-Identifier: Apache-2.0
"""Hook 40-leases with real DHCP servers and clients; what counts is the client identifier on the wire."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from support.dhcpnet import DhcpNetwork, options, options6
from support.netns import Capture
from support.tools import need

KEEP = {"VMFORK_IDENTITY": "keep"}
ROTATE = {"VMFORK_IDENTITY": "rotate"}
DISCOVER, REQUEST, RELEASE = 1, 3, 7
HALF = "00" * 7 + "80" + "00" * 8  # the fork token whose share is half of the window


@pytest.fixture
def network(tmp_path: Path) -> Iterator[DhcpNetwork]:
    with DhcpNetwork(tmp_path) as made:
        yield made


def start_dhclient(network: DhcpNetwork, *more: str) -> None:
    """As Debian's ifupdown does."""
    dhclient = need("dhclient", package="isc-dhcp-client")
    lease = "/var/lib/dhcp/dhclient.c0.leases"
    started = network.call(dhclient, "-4", "-i", "-pf", "/run/dhclient.c0.pid", "-lf", lease, "-I", *more, "c0")
    assert started.returncode == 0, started.stderr
    assert len(network.addresses()) == 1


def start_dhcpcd(network: DhcpNetwork, *more: str) -> None:
    dhcpcd = need("dhcpcd", package="dhcpcd-base")
    started = network.call(dhcpcd, "-4", "--waitip", "--noarp", *more, "c0")
    assert started.returncode == 0, started.stderr
    network.wait_for(lambda: len(network.addresses()) == 1, what="an address")


def spread(network: DhcpNetwork, seconds: int) -> None:
    """Configure the window."""
    settings = network.own_directory("/run/vmfork/vmfork.conf.d/spread.conf")
    settings.parent.mkdir(parents=True)
    settings.write_text(f"[React]\nSpreadSec={seconds}\n")


def duid_sent(wire: Capture) -> bytes:
    """The client identifier of the first DHCPv6 message on the wire."""
    frame = wire.wait(lambda frame: 1 in (options6(frame) or {}))
    assert frame is not None
    return (options6(frame) or {})[1]


@pytest.mark.parametrize("server", ["dnsmasq", "dhcpd"])
def test_dhclient_gets_a_new_client_id_and_another_address(network: DhcpNetwork, server: str) -> None:
    network.dnsmasq() if server == "dnsmasq" else network.dhcpd()
    wire = network.capture(network.server, "s0")
    start_dhclient(network)
    old, before = network.client_id(wire, REQUEST), network.addresses()
    wire.forget()
    done = network.leases(environment=ROTATE)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "under a new DUID; verified" in done.stdout
    new = network.client_id(wire, REQUEST)
    assert old
    assert new
    assert new != old
    # RFC 4361: ff, interface's number, then the DUID, here a DUID-UUID.
    assert new[0] == 0xFF
    assert new[5:7] == b"\x00\x04"
    assert len(network.addresses()) == 1
    assert network.addresses() != before
    assert not any((options(frame) or {}).get(53) == bytes([RELEASE]) for frame in wire.frames)


def test_a_clone_asks_when_its_share_of_the_spread_is_over(network: DhcpNetwork) -> None:
    spread(network, 6)
    network.dnsmasq()
    wire = network.capture(network.server, "s0")
    start_dhclient(network)
    network.client_id(wire, REQUEST)
    wire.forget()
    with ThreadPoolExecutor(max_workers=1) as beside:
        began = time.monotonic()
        # Half of the window, whatever the hook's own time is.
        told = {**KEEP, "VMFORK_FORK_TOKEN": HALF, "VMFORK_DEADLINE_SEC": "16"}
        action = beside.submit(lambda: network.leases(environment=told))
        network.wait_for(lambda: network.client_id(wire, REQUEST), timeout=40, what="a request")
        asked = time.monotonic() - began
        done = action.result()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "waiting 3.0 s" in done.stdout
    assert asked >= 3


def test_a_share_that_the_hook_has_no_time_for_is_a_failure_at_once(network: DhcpNetwork) -> None:
    spread(network, 60)
    told = {**KEEP, "VMFORK_FORK_TOKEN": HALF, "VMFORK_DEADLINE_SEC": "30"}
    done = network.leases(environment=told)
    assert done.returncode == 1
    assert "waiting" not in done.stdout
    assert "share of SpreadSec= ends in 30.0 s, and TimeoutSec= ends the hook in 2" in done.stderr
    assert "raise TimeoutSec= of this hook" in done.stderr


def test_dhclient_confirms_its_lease_when_the_identity_is_kept(network: DhcpNetwork) -> None:
    network.dnsmasq()
    wire = network.capture(network.server, "s0")
    start_dhclient(network)
    old, before = network.client_id(wire, REQUEST), network.addresses()
    network.ip(network.client, f"addr change {next(iter(before))}/24 dev c0 valid_lft 50 preferred_lft 50")
    network.ip(network.client, "route add 198.51.100.0/24 via 192.0.2.1")
    wire.forget()
    # Leases are dated in whole seconds.
    written = network.own_directory("/var/lib/dhcp/dhclient.c0.leases").stat().st_mtime
    network.wait_for(lambda: time.time() > written + 1.1, what="the next second")
    done = network.leases(environment=KEEP)
    assert done.returncode == 0, done.stdout + done.stderr
    assert network.client_id(wire, REQUEST) == old
    assert network.addresses() == before
    assert "198.51.100.0/24" in network.ip(network.client, "route")
    lifetime = int(network.ip(network.client, "-4 addr show dev c0").partition("valid_lft ")[2].partition("sec")[0])
    assert lifetime > 500


def test_dhclient_for_ipv6_gets_a_new_duid(network: DhcpNetwork) -> None:
    network.dnsmasq()
    network.wait_for(lambda: "tentative" not in network.ip(network.client, "-6 addr show dev c0"), what="DAD")
    wire = network.capture(network.server, "s0")
    dhclient = need("dhclient", package="isc-dhcp-client")
    network.call(dhclient, "-6", "-pf", "/run/dhclient6.pid", "-lf", "/var/lib/dhcp/dhclient6.c0.leases", "c0")
    before = network.addresses(6)
    assert len(before) == 1
    old = duid_sent(wire)
    wire.forget()
    done = network.leases(environment=ROTATE)
    assert done.returncode == 0, done.stdout + done.stderr
    assert duid_sent(wire) != old
    assert len(network.addresses(6)) == 1
    assert network.addresses(6) != before


def test_dhclient_that_is_known_by_its_mac_address_says_so(network: DhcpNetwork) -> None:
    network.dnsmasq()
    dhclient = need("dhclient", package="isc-dhcp-client")
    network.call(dhclient, "-4", "-pf", "/run/d.pid", "-lf", "/var/lib/dhcp/d.leases", "c0")
    done = network.leases(environment=ROTATE)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "names itself by the MAC address only" in done.stdout
    assert len(network.addresses()) == 1


def test_a_dead_server_is_a_failure(network: DhcpNetwork) -> None:
    network.dnsmasq()
    start_dhclient(network)
    network.ip(network.server, "link set s0 down")
    done = network.leases(environment=ROTATE, settings={"WaitSec": "2"})
    assert done.returncode == 1
    assert "no lease was given in time" in done.stderr


def test_dhcpcd_gets_a_new_client_id_and_another_address(network: DhcpNetwork) -> None:
    network.dnsmasq()
    wire = network.capture(network.server, "s0")
    start_dhcpcd(network)
    old, before = network.client_id(wire, REQUEST), network.addresses()
    wire.forget()
    done = network.leases(environment=ROTATE)
    assert done.returncode == 0, done.stdout + done.stderr
    new = network.client_id(wire, REQUEST)
    assert old
    assert new
    assert new != old
    assert new[5:7] == b"\x00\x04"
    network.wait_for(lambda: len(network.addresses()) == 1, what="one address")
    assert network.addresses() != before
    assert not any((options(frame) or {}).get(53) == bytes([RELEASE]) for frame in wire.frames)


def test_dhcpcd_renews_when_the_identity_is_kept(network: DhcpNetwork) -> None:
    network.dnsmasq()
    wire = network.capture(network.server, "s0")
    start_dhcpcd(network)
    old, before = network.client_id(wire, REQUEST), network.addresses()
    wire.forget()
    done = network.leases(environment=KEEP)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "verified" in done.stdout
    assert network.client_id(wire, REQUEST) == old
    assert network.addresses() == before


def test_dhcpcd_for_ipv6_gets_a_new_duid(network: DhcpNetwork) -> None:
    network.dnsmasq()
    network.wait_for(lambda: "tentative" not in network.ip(network.client, "-6 addr show dev c0"), what="DAD")
    wire = network.capture(network.server, "s0")
    dhcpcd = need("dhcpcd", package="dhcpcd-base")
    # No router answers here, and without one dhcpcd asks no server unless it is told to.
    configuration = network.top / "dhcpcd.conf"
    configuration.write_text("duid\nipv6only\nnoipv6rs\nia_na\n")
    assert network.call("mount", "--bind", str(configuration), "/etc/dhcpcd.conf").returncode == 0
    started = network.call(dhcpcd, "--waitip", "c0")
    assert started.returncode == 0, started.stderr
    network.wait_for(lambda: len(network.addresses(6)) == 1, what="an address")
    before = network.addresses(6)
    old = duid_sent(wire)
    wire.forget()
    done = network.leases(environment=ROTATE)
    assert done.returncode == 0, done.stdout + done.stderr
    assert duid_sent(wire) != old
    network.wait_for(lambda: len(network.addresses(6)) == 1, what="one address")
    assert network.addresses(6) != before


def test_a_static_configuration_is_left_alone(network: DhcpNetwork) -> None:
    network.dnsmasq()
    network.ip(network.client, "addr add 192.0.2.9/24 dev c0")
    wire = network.capture(network.server, "s0")
    done = network.leases(environment=ROTATE)
    assert done.returncode == 77, done.stdout + done.stderr
    assert network.addresses() == {"192.0.2.9"}
    assert wire.wait(lambda frame: options(frame) is not None, timeout=0.5) is None


def test_a_dry_run_sends_and_changes_nothing(network: DhcpNetwork) -> None:
    network.dnsmasq()
    start_dhclient(network)
    wire = network.capture(network.server, "s0")
    leases = network.own_directory("/var/lib/dhcp/dhclient.c0.leases").read_text()
    done = network.leases("--dry-run", environment=ROTATE)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "would restart dhclient on c0 (DHCPv4) for a new DUID and a new lease" in done.stdout
    assert wire.wait(lambda frame: options(frame) is not None, timeout=0.5) is None
    assert network.own_directory("/var/lib/dhcp/dhclient.c0.leases").read_text() == leases
