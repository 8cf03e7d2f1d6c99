# SPDX-License-Identifier: Apache-2.0
"""Network namespaces joined by a veth pair, frames captured in them, and actions run in them.

A `Network` has a client side (where actions run) and a server side (where the tests listen). Nothing outside of the two
namespaces is touched, and both are gone at the end.
"""

from __future__ import annotations

import ctypes
import json
import os
import secrets
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType

from support.tools import need, need_root, unavailable

CLONE_NEWNET = 0x40000000
ETH_P_ALL = 0x0003
AGENT = Path(__file__).resolve().parents[2] / "agent"

_DRIVER = """
import json, sys
from vmfork.actions import main
name, argv, settings, environment = json.loads(sys.argv[1])
sys.exit(main(name, argv, settings=settings, environment=environment, stdin=0))
"""


class Capture:
    """Frames on one interface, from now on."""

    def __init__(self, wire: socket.socket) -> None:
        self._wire = wire
        self.frames: list[bytes] = []

    def wait(self, wanted: Callable[[bytes], bool], *, timeout: float = 5.0) -> bytes | None:
        """The first frame, also of those already seen, that is wanted; None if there is none in time."""
        end = time.monotonic() + timeout
        for frame in self.frames:
            if wanted(frame):
                return frame
        while (left := end - time.monotonic()) > 0:
            if not select.select([self._wire], [], [], left)[0]:
                break
            frame = self._wire.recv(65536)
            self.frames.append(frame)
            if wanted(frame):
                return frame
        return None

    def forget(self) -> None:
        """Drop what was seen so far."""
        while select.select([self._wire], [], [], 0)[0]:
            self._wire.recv(65536)
        self.frames.clear()

    def close(self) -> None:
        self._wire.close()


class Network:
    """Two namespaces, `client` and `server`, joined by interfaces `c0` and `s0` that are up."""

    def __init__(self) -> None:
        need_root()
        need("ip", package="iproute2")
        need("nsenter", package="util-linux")
        tag = secrets.token_hex(3)
        self.client, self.server = f"vmfork-c-{tag}", f"vmfork-s-{tag}"
        self._children: list[subprocess.Popen[bytes]] = []
        self._captures: list[Capture] = []

    def __enter__(self) -> Network:
        for name in (self.client, self.server):
            made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
            if made.returncode != 0:
                self.close()
                unavailable(f"no network namespaces here: {made.stderr.strip()}")
        self.ip(self.client, "link add c0 type veth peer name s0 netns " + self.server)
        for name, link in ((self.client, "c0"), (self.server, "s0")):
            self.ip(name, "link set lo up")
            self.ip(name, f"link set {link} up")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop everything in the namespaces, by process ID, and remove them."""
        for child in self._children:
            child.kill()
            child.wait()
        for capture in self._captures:
            capture.close()
        for name in (self.client, self.server):
            listed = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, check=False)
            for pid in listed.stdout.split():
                try:
                    os.kill(int(pid), 9)
                except ProcessLookupError:
                    continue
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)

    def ip(self, namespace: str, command: str) -> str:
        """Run ip(8) in a namespace; what it printed."""
        done = subprocess.run(["ip", "-n", namespace, *command.split()], capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"ip {command}: {done.stderr}"
        return done.stdout

    def command(self, namespace: str, *argv: str) -> list[str]:
        """A command line that runs `argv` in a namespace, but with the file systems of this process."""
        return ["nsenter", f"--net=/run/netns/{namespace}", *argv]

    def run(self, namespace: str, *argv: str, timeout: float = 30) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(namespace, *argv), capture_output=True, text=True, timeout=timeout, check=False
        )

    def start(self, namespace: str, *argv: str) -> subprocess.Popen[bytes]:
        """Start a program that ends with the network at the latest."""
        child = subprocess.Popen(
            self.command(namespace, *argv),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self._children.append(child)
        return child

    def socket(self, namespace: str, make: Callable[[], socket.socket]) -> socket.socket:
        """A socket that lives in a namespace."""
        made: list[socket.socket | BaseException] = []

        def enter() -> None:
            libc = ctypes.CDLL(None, use_errno=True)
            with open(f"/run/netns/{namespace}", "rb") as place:
                if libc.setns(place.fileno(), CLONE_NEWNET) != 0:
                    made.append(OSError(ctypes.get_errno(), "setns"))
                    return
            try:
                made.append(make())
            except OSError as error:
                made.append(error)

        thread = threading.Thread(target=enter)
        thread.start()
        thread.join()
        result = made[0]
        if isinstance(result, BaseException):
            raise result
        return result

    def capture(self, namespace: str, link: str) -> Capture:
        """Capture whole frames on an interface."""

        def make() -> socket.socket:
            wire = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
            wire.bind((link, ETH_P_ALL))
            return wire

        capture = Capture(self.socket(namespace, make))
        self._captures.append(capture)
        return capture

    def action(
        self,
        name: str,
        *argv: str,
        settings: Mapping[str, str] | None = None,
        environment: Mapping[str, str] | None = None,
        timeout: float = 60,
    ) -> subprocess.CompletedProcess[str]:
        """Run an action on the client's side, as a shipped hook would."""
        return self.run(self.client, *driver(name, argv, settings, environment), timeout=timeout)

    def wait_for(self, condition: Callable[[], object], *, timeout: float = 10, what: str = "condition") -> None:
        """Wait until something is true."""
        end = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < end, f"not in time: {what}"
            time.sleep(0.05)


def driver(
    name: str,
    argv: Sequence[str],
    settings: Mapping[str, str] | None,
    environment: Mapping[str, str] | None,
) -> list[str]:
    """The command line that runs an action in a process of its own."""
    told = json.dumps([name, list(argv), dict(settings or {}), dict(environment or {})])
    return ["env", f"PYTHONPATH={AGENT}", sys.executable, "-c", _DRIVER, told]
