# SPDX-License-Identifier: Apache-2.0
"""A DHCP server and a client on a veth pair, with the client's files in a mount namespace of its own.

Clients write /etc/resolv.conf and state below /var/lib and /run: each of those is a directory of the test's here.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from support.netns import Capture, Network, driver
from support.tools import need

_SETUP = """
set -e
mount --make-rprivate /
mount --bind "$0/resolv.conf" /etc/resolv.conf
mount --bind "$0/run" /run
for place in /var/lib/dhcp /var/lib/dhcpcd; do
    if [ -d "$place" ]; then mount --bind "$0$place" "$place"; fi
done
touch "$0/ready"
exec sleep 600
"""


def options(frame: bytes) -> dict[int, bytes] | None:
    """The options of a DHCPv4 frame that a client sent; None for any other frame."""
    if frame[12:14] != b"\x08\x00" or frame[23] != 17:
        return None
    udp = 14 + (frame[14] & 15) * 4
    if frame[udp + 2 : udp + 4] != b"\x00\x43":
        return None
    data = frame[udp + 8 + 240 :]
    found: dict[int, bytes] = {}
    position = 0
    while position + 1 < len(data) and data[position] != 255:
        if data[position] == 0:
            position += 1
            continue
        length = data[position + 1]
        found[data[position]] = data[position + 2 : position + 2 + length]
        position += 2 + length
    return found


def options6(frame: bytes) -> dict[int, bytes] | None:
    """The options of a DHCPv6 frame that a client sent; None for any other frame."""
    if frame[12:14] != b"\x86\xdd" or frame[20] != 17 or frame[56:58] != b"\x02\x23":
        return None
    data, position = frame[66:], 0
    found: dict[int, bytes] = {}
    while position + 4 <= len(data):
        kind, length = int.from_bytes(data[position : position + 2]), int.from_bytes(data[position + 2 : position + 4])
        found[kind] = data[position + 4 : position + 4 + length]
        position += 4 + length
    return found


class DhcpNetwork(Network):
    """A `Network` whose client side has its own view of the files that DHCP clients write."""

    def __init__(self, top: Path) -> None:
        super().__init__()
        self.top = top
        self._machine: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> DhcpNetwork:
        super().__enter__()
        for place in ("run", "var/lib/dhcp", "var/lib/dhcpcd"):
            (self.top / place).mkdir(parents=True)
        (self.top / "var/lib/dhcpcd").chmod(0o755)
        (self.top / "resolv.conf").touch()
        self._machine = self.start(
            self.client, "unshare", "--mount", "--propagation", "private", "sh", "-c", _SETUP, str(self.top)
        )
        self.wait_for((self.top / "ready").exists, what="the client's mounts")
        self.ip(self.server, "addr add 192.0.2.1/24 dev s0")
        self.ip(self.server, "addr add 2001:db8::1/64 dev s0 nodad")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def inside(self, *argv: str) -> list[str]:
        """A command line that runs in the client's network and mounts."""
        assert self._machine is not None
        return ["nsenter", "-t", str(self._machine.pid), "--net", "--mount", *argv]

    def call(self, *argv: str, timeout: float = 40) -> subprocess.CompletedProcess[str]:
        """Run something in the client's network and mounts."""
        return subprocess.run(self.inside(*argv), capture_output=True, text=True, timeout=timeout, check=False)

    def leases(
        self, *argv: str, environment: Mapping[str, str] | None = None, settings: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run the action as a hook would."""
        return self.call(*driver("leases", argv, settings, environment), timeout=60)

    def dnsmasq(self, *more: str) -> None:
        """Start dnsmasq as DHCP server for both versions."""
        program = need("dnsmasq", package="dnsmasq-base")
        (self.top / "dnsmasq.conf").touch()
        self.start(
            self.server, program, "-k", f"--conf-file={self.top}/dnsmasq.conf", "--port=0", "--user=root",
            "--interface=s0", "--bind-dynamic", "--dhcp-range=192.0.2.100,192.0.2.200,255.255.255.0,10m",
            "--dhcp-range=2001:db8::100,2001:db8::1ff,64,10m", f"--dhcp-leasefile={self.top}/server.leases",
            f"--pid-file={self.top}/dnsmasq.pid", "--dhcp-authoritative", "--no-ping", *more,
        )  # fmt: skip
        self.wait_for((self.top / "dnsmasq.pid").exists, what="dnsmasq")

    def dhcpd(self) -> None:
        """Start ISC's DHCP server for DHCPv4."""
        program = need("dhcpd", package="isc-dhcp-server")
        (self.top / "dhcpd.conf").write_text(
            "authoritative; ddns-update-style none; ping-check false; default-lease-time 600;\n"
            "subnet 192.0.2.0 netmask 255.255.255.0 { range 192.0.2.100 192.0.2.200; }\n"
        )
        (self.top / "dhcpd.leases").touch()
        self.start(
            self.server, program, "-4", "-f", "-q", "-cf", f"{self.top}/dhcpd.conf", "-lf", f"{self.top}/dhcpd.leases",
            "-pf", f"{self.top}/dhcpd.pid", "s0",
        )  # fmt: skip
        self.wait_for((self.top / "dhcpd.pid").exists, what="dhcpd")

    def addresses(self, version: int = 4) -> set[str]:
        """The client's leased addresses."""
        lines = self.ip(self.client, f"-o -{version} addr show dev c0 scope global").splitlines()
        return {line.split()[3].partition("/")[0] for line in lines}

    def client_id(self, wire: Capture, kind: int) -> bytes | None:
        """The client identifier of the next DHCPv4 message of that type (1 discover, 3 request) on the wire."""
        frame = wire.wait(lambda frame: (options(frame) or {}).get(53) == bytes([kind]))
        return None if frame is None else (options(frame) or {}).get(61, b"")

    def own_directory(self, path: str) -> Path:
        """Where a path of the client's really is."""
        return self.top / os.path.relpath(path, "/")
