# SPDX-License-Identifier: Apache-2.0
"""How networkd-dispatcher and NetworkManager's dispatcher are started, given scripts, and told of an event.

Both are told over the system bus. Theirs is a dbus-daemon of their own in a copy of this machine, which neither can
leave: its socket is in the copy's /run, its links are in the copy's network namespace. The event comes from a program
that is up before, in the place of systemd-networkd or NetworkManager.
"""

from __future__ import annotations

import contextlib
import itertools
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.footprint import ready_ms
from bench.peers_layer import Running, inside, layer, put_scripts
from bench.place import copy_script, inside_environment, pinned, running, scratch, until

# What both programs below begin with. GDBus answers the calls of others in a thread of its own.
_TO_BUS = """
import gi, os, socket, subprocess, sys, time
gi.require_version("Gio", "2.0")
from gi.repository import Gio, GLib
bus = Gio.bus_get_sync(Gio.BusType.SYSTEM)
def ask_bus(method, kind, *values):
    name = "org.freedesktop.DBus"
    return bus.call_sync(name, "/org/freedesktop/DBus", name, method, GLib.Variant(kind, values), None, 0, -1)[0]
"""

# Each line that comes in is a state of eth0; the answer is the moment of the signal that says so. The files are what
# networkctl reads of systemd-networkd.
_NETWORKD = """
subprocess.run(["ip", "link", "add", "eth0", "type", "veth", "peer", "name", "other"], check=True)
if ask_bus("RequestName", "(su)", "org.freedesktop.network1", 0) != 1:
    sys.exit("the name has an owner")
index = str(socket.if_nametoindex("eth0"))
path = f"/org/freedesktop/network1/link/_{ord(index[0]):x}{index[1:]}"
os.makedirs("/run/systemd/netif/links")
for name in ("state", f"links/{index}"):
    with open(f"/run/systemd/netif/{name}", "w") as file:
        file.write("ADMIN_STATE=configured\\nOPER_STATE=carrier\\n")
print("up", flush=True)
for line in sys.stdin:
    changed = {"OperationalState": GLib.Variant("s", line.strip())}
    content = GLib.Variant("(sa{sv}as)", ("org.freedesktop.network1.Link", changed, []))
    begin = time.monotonic_ns()
    bus.emit_signal(None, path, "org.freedesktop.DBus.Properties", "PropertiesChanged", content)
    bus.flush_sync()
    print(begin, flush=True)
"""

# Each line that comes in is an action; the answer is the moment of the call, and comes when all scripts have ended.
_NETWORK_MANAGER = """
name = "org.freedesktop.nm_dispatcher"
print("up", flush=True)
end = time.monotonic() + 60
while not ask_bus("NameHasOwner", "(s)", name):
    if time.monotonic() > end:
        sys.exit("not in time")
    time.sleep(0.001)
print(time.monotonic_ns(), flush=True)
for line in sys.stdin:
    values = (line.strip(), *[{}] * 8, "", "", *[{}] * 3, False)
    content = GLib.Variant("(sa{sa{sv}}" + "a{sv}" * 7 + "ss" + "a{sv}" * 3 + "b)", values)
    begin = time.monotonic_ns()
    bus.call_sync(name, "/org/freedesktop/nm_dispatcher", name, "Action", content, None, 0, -1)
    print(begin, flush=True)
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bus:
    """A system bus that is up in a copy of this machine; `directory` is what the copy was made of."""

    pid: int
    directory: Path

    def enter(self, command: Sequence[str], *more: str) -> list[str]:
        """The command line that runs `command` in the copy, with `more` in its environment."""
        spaces = ["--mount", "--uts", "--ipc", "--net", "--root", "--wd"]
        bounds = ["setpriv", "--bounding-set=-sys_time", "env", "-i", *inside_environment(), *more]
        return ["nsenter", "--target", str(self.pid), *spaces, *bounds, *command]

    @contextlib.contextmanager
    def program(self, text: str) -> Iterator[Teller]:
        command = self.enter(["/usr/bin/python3", "-I", "-c", _TO_BUS + text])
        with running(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as child:
            teller = Teller(child)
            teller.read()
            yield teller


class Teller:
    """The program that makes events: a line to it, a line from it."""

    def __init__(self, child: subprocess.Popen[bytes]) -> None:
        self._child = child

    def read(self) -> bytes:
        assert self._child.stdout is not None
        line = self._child.stdout.readline()
        if not line:
            raise OSError("the program that makes the events has ended")
        return line

    def tell(self, what: str) -> int:
        """Make one event; its moment, CLOCK_MONOTONIC ns."""
        assert self._child.stdin is not None
        self._child.stdin.write(what.encode() + b"\n")
        self._child.stdin.flush()
        return int(self.read())


@contextlib.contextmanager
def _bus(scripts: Sequence[Path], directory: Path, *places: str) -> Iterator[Bus]:
    """A bus, in a copy where each script is linked to from all of these places."""
    for place in places:
        target = directory / "upper" / place
        target.mkdir(parents=True)
        for path in scripts:
            (target / path.name).symlink_to(inside(path))
    lower = layer(directory)
    # The one that comes with the package would run, too.
    (directory / "layer/etc/NetworkManager/dispatcher.d/01-ifupdown").unlink(missing_ok=True)
    policy = directory / "upper/etc/dbus-1/system.d/bench.conf"
    policy.parent.mkdir(parents=True)
    policy.write_text('<busconfig><policy user="root"><allow own="org.freedesktop.network1"/></policy></busconfig>\n')
    (directory / "guest/run/dbus").mkdir(parents=True)
    command = copy_script(directory, ["dbus-daemon", "--system", "--nofork", "--nopidfile"], lower=lower)
    # networkctl looks a link up in sysfs, which shows the links of the namespace in which it was mounted.
    command[-1] = command[-1].replace(f"mount --bind {directory}/guest/sys", "mount -t sysfs -o ro sysfs")
    with open(directory / "log", "wb") as log, running(pinned(1, command), stderr=log, stdout=log) as child:
        until((directory / "guest/run/dbus/system_bus_socket").exists, "the bus is up")
        yield Bus(pid=child.pid, directory=directory)


@contextlib.contextmanager
def networkd_dispatcher(program: Path, count: int) -> Iterator[Running]:
    with scratch() as name, contextlib.ExitStack() as stack:
        directory = Path(name)
        scripts = put_scripts(directory, program, count)
        # Only a state that is not the last one is an event: there are two, with the same scripts.
        states = ("routable", "degraded")
        bus = stack.enter_context(_bus(scripts, directory, *(f"etc/networkd-dispatcher/{one}.d" for one in states)))
        teller = stack.enter_context(bus.program(_NETWORKD))
        ready = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
        ready.bind(str(directory / "guest/run/notify"))
        command = bus.enter(["/usr/bin/networkd-dispatcher"], "NOTIFY_SOCKET=/run/notify")
        log = stack.enter_context(open(directory / "log-dispatcher", "wb"))
        begin = time.perf_counter_ns()
        child = stack.enter_context(running(pinned(1, command), stderr=log, stdout=log))
        started = ready_ms(ready, begin)
        turns = itertools.cycle(states)
        yield Running(
            pid=child.pid,
            fire=lambda: teller.tell(next(turns)),
            scripts=scripts,
            started_ms=started,
        )


@contextlib.contextmanager
def nm_dispatcher(program: Path, count: int) -> Iterator[Running]:
    with scratch() as name, contextlib.ExitStack() as stack:
        directory = Path(name)
        scripts = put_scripts(directory, program, count)
        bus = stack.enter_context(_bus(scripts, directory, "etc/NetworkManager/dispatcher.d"))
        teller = stack.enter_context(bus.program(_NETWORK_MANAGER))
        command = bus.enter(["/usr/lib/NetworkManager/nm-dispatcher", "--persist"])
        log = stack.enter_context(open(directory / "log-dispatcher", "wb"))
        begin = time.monotonic_ns()
        child = stack.enter_context(running(pinned(1, command), stderr=log, stdout=log))
        started = (int(teller.read()) - begin) / 1e6
        yield Running(
            pid=child.pid,
            fire=lambda: teller.tell("hostname"),
            scripts=scripts,
            started_ms=started,
        )
