# SPDX-License-Identifier: Apache-2.0
"""Runs in a network namespace of its own: a learning switch between QEMU processes, and one DHCP server.

QEMU processes connect to a stream socket; on it, each frame follows its length (4 bytes, big-endian). The server is
dnsmasq behind a TAP interface of this namespace, so a host on the same wire as the guests is here, too. The standard
input takes questions, one JSON object a line, each answered by one line on the standard output. When the standard input
ends, so does everything; the namespace goes with its last process. Standard library only.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import selectors
import socket
import struct
import subprocess
import sys
import time
from collections import defaultdict
from typing import Any, Protocol

INTERFACE = "lan"
SERVER = "10.71.0.1"
PREFIX = 24
FIRST, LAST = "10.71.0.100", "10.71.0.199"

_TUNSETIFF, _IFF_TAP, _IFF_NO_PI = 0x400454CA, 0x0002, 0x1000
_ETH_P_IP, _ETH_P_ARP, _ETH_P_RARP = 0x0800, 0x0806, 0x8035
_UDP, _DHCP_SERVER_PORT = 17, 67
_DHCP_COOKIE = bytes.fromhex("63825363")
_DHCP_TYPES = {1: "discover", 3: "request", 4: "decline", 7: "release", 8: "inform"}
_BROADCAST = b"\xff" * 6
_NOBODY = bytes.fromhex("020000000001")
_MAX_FRAME = 65536
# A paused guest reads nothing: what a wire would lose is lost here, instead of piling up.
_MAX_WAITING = 1 << 20


class Port(Protocol):
    """Where frames come from and go to."""

    @property
    def descriptor(self) -> int: ...
    def receive(self) -> list[bytes] | None:
        """Frames that arrived; None when the other end is gone."""

    def send(self, frame: bytes) -> None:
        """Send a frame, or drop it."""


class Tap:
    """The namespace's own interface: the server's port."""

    def __init__(self) -> None:
        self.descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        fcntl.ioctl(self.descriptor, _TUNSETIFF, struct.pack("16sH22x", INTERFACE.encode(), _IFF_TAP | _IFF_NO_PI))

    def receive(self) -> list[bytes] | None:
        try:
            return [os.read(self.descriptor, _MAX_FRAME)]
        except BlockingIOError:
            return []

    def send(self, frame: bytes) -> None:
        with contextlib.suppress(OSError):
            os.write(self.descriptor, frame)


class Plug:
    """One QEMU process."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self._connection = connection
        self._unread = bytearray()
        self._waiting = bytearray()

    @property
    def descriptor(self) -> int:
        return self._connection.fileno()

    def receive(self) -> list[bytes] | None:
        try:
            data = self._connection.recv(1 << 20)
        except BlockingIOError:
            return []
        except OSError:
            return None
        if not data:
            return None
        self._unread += data
        frames = []
        while len(self._unread) >= 4 and len(self._unread) >= 4 + (length := int.from_bytes(self._unread[:4])):
            frames.append(bytes(self._unread[4 : 4 + length]))
            del self._unread[: 4 + length]
        return frames

    def send(self, frame: bytes) -> None:
        if len(self._waiting) < _MAX_WAITING:
            self._waiting += len(frame).to_bytes(4) + frame
        with contextlib.suppress(OSError):
            del self._waiting[: self._connection.send(self._waiting)]

    def close(self) -> None:
        self._connection.close()


class Switch:
    """Learns which MAC address is behind which port, floods what it does not know, and remembers what it saw."""

    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener
        self._selector = selectors.DefaultSelector()
        self._ports: dict[int, Port] = {}
        self._behind: dict[bytes, int] = {}
        self._numbers = 0
        self.forget()
        listener.setblocking(False)
        self._selector.register(listener, selectors.EVENT_READ, self._accept)
        self._add(Tap())

    def forget(self) -> None:
        """Begin the record of what is seen anew."""
        self._macs: dict[str, set[int]] = defaultdict(set)
        self._addresses: dict[str, set[int]] = defaultdict(set)
        self._dhcp: list[tuple[float, int, str, str]] = []

    def seen(self) -> dict[str, Any]:
        """Since the last `forget`: behind which ports a MAC address sent, and an IPv4 address was claimed (ARP).

        And what was asked of DHCP servers: when on CLOCK_MONOTONIC, behind which port, from which MAC address, what.
        """
        return {
            "macs": {mac: sorted(ports) for mac, ports in self._macs.items()},
            "addresses": {address: sorted(ports) for address, ports in self._addresses.items()},
            "dhcp": self._dhcp,
        }

    def serve(self, questions: int) -> None:
        """Switch frames until the questions end."""
        self._selector.register(questions, selectors.EVENT_READ, None)
        unread = b""
        while True:
            for key, _ in self._selector.select():
                if key.data is not None:
                    key.data()
                    continue
                data = os.read(questions, 65536)
                if not data:
                    return
                *lines, unread = (unread + data).split(b"\n")
                for line in lines:
                    print(json.dumps(self._answer(json.loads(line))), flush=True)

    def _answer(self, question: dict[str, Any]) -> dict[str, Any]:
        if question["ask"] == "forget":
            self.forget()
        elif question["ask"] == "who-has":
            self._probe(question["address"])
        return self.seen()

    def _probe(self, address: str) -> None:
        """Ask everybody who has an address, from nobody's (RFC 5227), so that nobody learns from it."""
        request = struct.pack("!HHBBH", 1, 0x0800, 6, 4, 1) + _NOBODY + bytes(10) + socket.inet_aton(address)
        for port in self._ports.values():
            port.send(_BROADCAST + _NOBODY + _ETH_P_ARP.to_bytes(2) + request)

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except BlockingIOError:
            return
        self._add(Plug(connection))

    def _add(self, port: Port) -> None:
        number, self._numbers = self._numbers, self._numbers + 1
        self._ports[number] = port
        self._selector.register(port.descriptor, selectors.EVENT_READ, lambda: self._receive(number, port))

    def _receive(self, number: int, port: Port) -> None:
        frames = port.receive()
        if frames is None:
            self._selector.unregister(port.descriptor)
            del self._ports[number]
            self._behind = {mac: at for mac, at in self._behind.items() if at != number}
            assert isinstance(port, Plug)
            port.close()
            return
        for frame in frames:
            if len(frame) >= 14:
                self._forward(number, frame)

    def _forward(self, number: int, frame: bytes) -> None:
        target, source = frame[:6], frame[6:12]
        self._note(number, frame)
        self._behind[source] = number
        only = None if target[0] & 1 else self._behind.get(target)
        for other, port in self._ports.items():
            if other != number and only in (None, other):
                port.send(frame)

    def _note(self, number: int, frame: bytes) -> None:
        kind = int.from_bytes(frame[12:14])
        # QEMU announces a restored guest by RARP, with the MAC address that its command line has: not the guest's word.
        if kind == _ETH_P_RARP:
            return
        self._macs[frame[6:12].hex(":")].add(number)
        if kind == _ETH_P_ARP and len(frame) >= 42 and frame[28:32] != bytes(4):
            self._addresses[socket.inet_ntoa(frame[28:32])].add(number)
        elif kind == _ETH_P_IP and (asked := dhcp_request(frame)):
            self._dhcp.append((time.monotonic(), number, frame[6:12].hex(":"), asked))


def dhcp_request(frame: bytes) -> str | None:
    """The type of the message if an IPv4 frame takes one to a DHCP server."""
    udp = 14 + (frame[14] & 0x0F) * 4 if len(frame) > 14 else 14
    options = udp + 8 + 236
    if len(frame) < options + 4 or frame[23] != _UDP or int.from_bytes(frame[udp + 2 : udp + 4]) != _DHCP_SERVER_PORT:
        return None
    if frame[options : options + 4] != _DHCP_COOKIE:
        return None
    at = options + 4
    while at + 2 < len(frame) and frame[at] != 255:
        if frame[at] == 53:
            return _DHCP_TYPES.get(frame[at + 2], "other")
        at += 1 if frame[at] == 0 else 2 + frame[at + 1]
    return None


def start_server(log: str, leases: str) -> subprocess.Popen[bytes]:
    """dnsmasq on the namespace's interface; it ends with this process."""
    for argv in (
        ("ip", "link", "set", "lo", "up"),
        ("ip", "address", "add", f"{SERVER}/{PREFIX}", "dev", INTERFACE),
        ("ip", "link", "set", INTERFACE, "up"),
    ):
        subprocess.run(argv, check=True)
    # It does not ping an address before it gives it away (a pause of seconds): the leases alone keep clones apart.
    options = (
        "--keep-in-foreground", "--conf-file=/dev/null", "--user=root", "--port=0", "--no-resolv", "--no-hosts",
        f"--interface={INTERFACE}", "--bind-interfaces", f"--dhcp-range={FIRST},{LAST},1h", "--dhcp-authoritative",
        "--no-ping", "--log-dhcp", f"--log-facility={log}", f"--dhcp-leasefile={leases}", "--pid-file=",
    )  # fmt: skip
    return subprocess.Popen(("setpriv", "--pdeathsig", "KILL", "dnsmasq", *options), stdin=subprocess.DEVNULL)


def main() -> None:
    """Arguments: the descriptor of a listening stream socket, dnsmasq's log and its file of leases."""
    switch = Switch(socket.socket(fileno=int(sys.argv[1])))
    server = start_server(sys.argv[2], sys.argv[3])
    print("{}", flush=True)
    try:
        switch.serve(0)
    finally:
        server.kill()
        server.wait()


if __name__ == "__main__":
    main()
