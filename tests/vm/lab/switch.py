# SPDX-License-Identifier: Apache-2.0
"""A network for guests: one virtual switch, one DHCP server, and a look at both from outside of the guests.

It lives in a network namespace of its own (`switch_process.py`) and QEMU reaches it through a socket, so the host's
network is never touched, and it is gone when whoever started it is gone. `connected` plugs a kind of guest in; every
restore of such a guest is another port of the same switch.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lab.deadline import until
from lab.guest import Spec
from lab.host import LabError, tool
from lab.switch_process import SERVER as SERVER

_PROCESS = Path(__file__).with_name("switch_process.py")
MAC = "52:54:00:71:00:01"


@dataclass(frozen=True, slots=True, kw_only=True)
class DhcpMessage:
    """A message to the DHCP server: when (CLOCK_MONOTONIC, seconds), behind which port, from which MAC address."""

    at: float
    port: int
    mac: str
    kind: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What the switch saw: the ports behind which a MAC address sent, and those that claimed an IPv4 address.

    `dhcp` is what the guests asked of the DHCP server, in the order in which it came.
    """

    macs: dict[str, tuple[int, ...]]
    addresses: dict[str, tuple[int, ...]]
    dhcp: tuple[DhcpMessage, ...]


class Switch:
    """A running switch with its server."""

    def __init__(self, process: subprocess.Popen[bytes], path: str, directory: Path) -> None:
        self._process = process
        self._path = path
        self.server_log = directory / "dnsmasq.log"
        self.leases = directory / "dnsmasq.leases"

    def connected(self, spec: Spec) -> Spec:
        """The same kind of guest with a network card at this switch, as its administrator sees it: eth0."""
        path = self._path.replace(",", ",,")
        backend = ("-netdev", f"stream,id=lan,server=off,addr.type=unix,addr.path={path}")
        # Without a boot ROM: that is a package of its own, and these guests never boot from the network.
        card = ("-device", f"virtio-net-pci,netdev=lan,mac={MAC},romfile=")
        return replace(spec, name=f"{spec.name}-lan", machine=(*spec.machine, *backend, *card))

    def seen(self) -> Seen:
        """What the switch saw since it was told to forget."""
        return self._ask("seen")

    def forget(self) -> None:
        """Let what was seen so far count no more."""
        self._ask("forget")

    def claimants(self, address: str, *, at_least: int, seconds: float = 60) -> tuple[int, ...]:
        """Ask on the wire who has an address, until this many have answered; their ports."""

        def ask() -> tuple[int, ...] | None:
            ports = self._ask("who-has", address=address).addresses.get(address, ())
            return ports if len(ports) >= at_least else None

        return until(ask, seconds=seconds, what=f"{at_least} guests claim {address}", every=0.5)

    def run(self, *argv: str, seconds: float = 30) -> subprocess.CompletedProcess[str]:
        """Run a program of the host as a neighbour of the guests, at the server's address."""
        namespace = f"--net=/proc/{self._process.pid}/ns/net"
        command = [tool("nsenter"), namespace, *argv]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=seconds)

    def logged(self) -> str:
        """What the DHCP server has logged."""
        return self.server_log.read_text(errors="replace") if self.server_log.exists() else ""

    def _ask(self, what: str, **more: str) -> Seen:
        process = self._process
        assert process.stdin
        assert process.stdout
        try:
            process.stdin.write(json.dumps({"ask": what, **more}).encode() + b"\n")
            process.stdin.flush()
            answer: dict[str, Any] = json.loads(process.stdout.readline())
        except (OSError, ValueError) as error:
            raise LabError(f"the switch ended: {self.logged()[-2000:]}") from error
        macs, addresses = ({key: tuple(ports) for key, ports in answer[kind].items()} for kind in ("macs", "addresses"))
        dhcp = tuple(DhcpMessage(at=at, port=port, mac=mac, kind=kind) for at, port, mac, kind in answer["dhcp"])
        return Seen(macs=macs, addresses=addresses, dhcp=dhcp)


def missing() -> str | None:
    """Why there can be no such network here, None where there can."""
    for program, package in (("dnsmasq", "dnsmasq-base"), ("ip", "iproute2")):
        if shutil.which(program) is None:
            return f"{program} is not installed: apt-get install {package}"
    if not os.path.exists("/dev/net/tun"):
        return "there is no /dev/net/tun: modprobe tun"
    return None


@contextmanager
def switch(directory: Path) -> Iterator[Switch]:
    """A switch for the length of this context; the server's log and leases are in `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    # The path of a socket may have 107 bytes; a cache directory can be deeper than that.
    with tempfile.TemporaryDirectory(prefix="vmfork-lab-") as short, socket.socket(socket.AF_UNIX) as listener:
        path = f"{short}/switch"
        listener.bind(path)
        listener.listen()
        command = [
            *(tool("setpriv"), "--pdeathsig", "KILL", tool("unshare"), "--net"),
            *(sys.executable, "-I", os.fspath(_PROCESS), str(listener.fileno())),
            *(os.fspath(directory / "dnsmasq.log"), os.fspath(directory / "dnsmasq.leases")),
        ]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=[listener.fileno()])
        try:
            made = Switch(process, path, directory)
            assert process.stdout
            if not process.stdout.readline():
                raise LabError("the switch did not start; does this machine have /dev/net/tun and dnsmasq?")
            until(lambda: "DHCP, IP range" in made.logged(), seconds=30, what="dnsmasq serves")
            yield made
        finally:
            assert process.stdin
            process.stdin.close()
            process.wait(10)
