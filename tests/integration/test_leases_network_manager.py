# SPDX-License-Identifier: Apache-2.0
"""Hook 40-leases with a real NetworkManager and a real DHCP server: what is seen on the wire.

NetworkManager runs out of its unpacked package in a network namespace, with a message bus of its own; a script stands
in for the service manager that restarts it. It under systemd is seen in the virtual machine tests.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from support.dhcpnet import DhcpNetwork, options, options6
from support.netns import driver
from support.tickets import open_directory
from support.tools import need
from support.unpacked import Unpacked, unpack

DISCOVER, REQUEST, RELEASE = 1, 3, 7
ROTATE = {"VMFORK_IDENTITY": "rotate"}
KEEP = {"VMFORK_IDENTITY": "keep"}

CONNECTION = """[connection]
id=lan
type=ethernet
interface-name=c0

[ipv4]
method=auto
{ipv4}

[ipv6]
method=auto
addr-gen-mode=stable-privacy
"""

START = "setsid sh -c 'echo $$ >/run/nm.pid; exec NetworkManager --no-daemon' >>{top}/nm.log 2>&1 </dev/null &"

# The unit is of Type=dbus: active when NetworkManager answers on the bus.
SYSTEMCTL = """#!/bin/sh
case "$*" in
*is-active*NetworkManager.service*) nmcli general >/dev/null 2>&1 ;;
*MainPID*NetworkManager.service*) cat /run/nm.pid ;;
*try-restart*NetworkManager.service*)
    kill "$(cat /run/nm.pid)"
    while kill -0 "$(cat /run/nm.pid)" 2>/dev/null; do sleep 0.05; done
    {start} ;;
*) exit 3 ;;
esac
"""

MOUNTS = (
    "mount -t tmpfs tmpfs /run",
    "mkdir -p /run/systemd/system /run/dbus /run/NetworkManager",
    "mount -t tmpfs tmpfs /var/lib",
    "mkdir -p /var/lib/NetworkManager /var/lib/dbus",
    # Devices of a read-only /sys are taken as they are, and udev is not waited for.
    "mount -t sysfs -o ro sysfs /sys",
)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return unpack(tmp_path_factory.mktemp("network-manager"), "network-manager", "dbus")


@pytest.fixture
def top() -> Iterator[Path]:
    with open_directory() as directory:
        yield directory


@pytest.fixture
def network(top: Path) -> Iterator[DhcpNetwork]:
    need("dnsmasq", package="dnsmasq-base")
    (top / "net").mkdir()
    with DhcpNetwork(top / "net") as made:
        made.dnsmasq("--enable-ra")
        yield made


class Managed:
    """NetworkManager on the client's side of a network."""

    def __init__(self, network: DhcpNetwork, tree: Path, top: Path) -> None:
        self.network, self.top = network, top
        self.machine_id = top / "machine-id"
        self.machine_id.write_text("1" * 32 + "\n")
        (top / "bin").mkdir()
        systemctl = top / "bin/systemctl"
        systemctl.write_text(SYSTEMCTL.format(start=START.format(top=top)))
        systemctl.chmod(0o755)
        mounts = (f"mount --bind {top}/bin /usr/local/sbin", f"mount --bind {self.machine_id} /etc/machine-id")
        layers = top / "layers"
        self.unpacked = Unpacked(tree, layers, ["messagebus"], network=network.client, more=(*MOUNTS, *mounts))
        self.profiles = self.unpacked.etc / "NetworkManager/system-connections"
        self.profiles.mkdir(parents=True)
        (self.unpacked.etc / "NetworkManager/NetworkManager.conf").write_text(
            "[main]\nplugins=keyfile\ndhcp=internal\ndns=none\nrc-manager=unmanaged\n"
        )

    def start(self, ipv4: str) -> None:
        """Start it with a connection, and wait for leases of both versions."""
        profile = self.profiles / "lan.nmconnection"
        profile.write_text(CONNECTION.format(ipv4=ipv4))
        profile.chmod(0o600)
        self.unpacked.__enter__()
        self.unpacked.start("dbus-daemon", "--system", "--nofork", "--nopidfile")
        self.until("[ -S /run/dbus/system_bus_socket ]")
        self.unpacked.run("sh", "-c", START.format(top=self.top))
        self.until_leased()

    def until(self, condition: str) -> None:
        def met() -> bool:
            return self.unpacked.run("sh", "-c", condition, check=False).returncode == 0

        self.network.wait_for(met, timeout=30, what=condition)

    def until_leased(self) -> None:
        self.until("nmcli -g DHCP4,DHCP6 device show c0 | grep -c 'ip_address = \\|ip6_address = ' | grep -q 2")

    def leases(self, *argv: str, environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
        return self.unpacked.run(*driver("leases", argv, {"WaitSec": "20"}, environment), check=False)


@pytest.fixture
def managed(network: DhcpNetwork, tree: Path, top: Path) -> Iterator[Managed]:
    made = Managed(network, tree, top)
    yield made
    made.unpacked.close()


def kinds(frames: list[bytes]) -> set[int]:
    """The DHCPv4 messages among the frames."""
    found = ((options(frame) or {}).get(53) for frame in frames)
    return {kind[0] for kind in found if kind}


def duid(frame: bytes) -> bytes | None:
    """The client identifier of DHCPv6."""
    return (options6(frame) or {}).get(1)


def test_a_new_identity_is_another_client_on_the_wire(managed: Managed, network: DhcpNetwork) -> None:
    wire = network.capture(network.server, "s0")
    managed.start("dhcp-client-id=stable")
    old_id, old = network.client_id(wire, REQUEST), network.addresses()
    seen = wire.wait(lambda frame: duid(frame) is not None)
    assert seen is not None
    old_duid, old_six = duid(seen), network.addresses(6)
    secret = managed.unpacked.run("sha256sum", "/var/lib/NetworkManager/secret_key").stdout
    wire.forget()
    # What 20-machine-id has done before.
    managed.machine_id.write_text("2" * 32 + "\n")

    done = managed.leases(environment=ROTATE)

    assert done.returncode == 0, done.stdout + done.stderr
    assert "removed /var/lib/NetworkManager/secret_key" in done.stdout
    assert "NetworkManager has a new lease under a new client ID; verified" in done.stdout
    assert managed.unpacked.run("sha256sum", "/var/lib/NetworkManager/secret_key").stdout != secret
    new_id = network.client_id(wire, REQUEST)
    assert old_id
    assert new_id
    assert new_id != old_id
    assert len(network.addresses()) == 1
    assert network.addresses() != old
    managed.until_leased()
    seen = wire.wait(lambda frame: duid(frame) is not None)
    assert seen is not None
    assert duid(seen) != old_duid
    assert network.addresses(6) != old_six


def test_a_kept_identity_asks_again_and_never_lets_go_of_its_addresses(managed: Managed, network: DhcpNetwork) -> None:
    wire = network.capture(network.server, "s0")
    managed.start("")
    old_id, old, old_six = network.client_id(wire, REQUEST), network.addresses(), network.addresses(6)
    wire.forget()
    said = len((managed.top / "nm.log").read_text())

    done = managed.leases(environment=KEEP)

    assert done.returncode == 0, done.stdout + done.stderr
    assert "NetworkManager has a new lease; verified" in done.stdout
    assert network.client_id(wire, REQUEST) == old_id
    assert kinds(wire.frames) & {DISCOVER, RELEASE} == set()
    assert (network.addresses(), network.addresses(6)) == (old, old_six)
    applied = managed.unpacked.run("nmcli", "-g", "ipv4.dhcp-timeout", "connection", "show", "--active", "lan").stdout
    assert applied.split() == ["0"]
    assert "deactivating" not in (managed.top / "nm.log").read_text()[said:]


def test_a_client_known_by_its_mac_address_is_said(managed: Managed, network: DhcpNetwork) -> None:
    managed.start("dhcp-client-id=mac")
    done = managed.leases(environment=ROTATE)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the client ID is the MAC address or was configured" in done.stdout


def test_a_dry_run_changes_nothing(managed: Managed, network: DhcpNetwork) -> None:
    managed.start("dhcp-client-id=stable")
    wire = network.capture(network.server, "s0")
    done = managed.leases("--dry-run", environment=ROTATE)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "would restart NetworkManager.service and bring c0 up again" in done.stdout
    assert "would remove /var/lib/NetworkManager/secret_key" in done.stdout
    assert kinds(wire.frames) == set()
    managed.unpacked.run("test", "-e", "/var/lib/NetworkManager/secret_key")
