# SPDX-License-Identifier: Apache-2.0
"""Running daemons, found in the process table and only trusted as far as the kernel vouches for them.

A name and a command line are whatever a process says of itself. So a daemon counts only if all its user IDs are root's
(or those of the system account that it is known to give up root for), if it runs the very program that is installed,
and if it shares this process's mounts and network.
"""

from __future__ import annotations

import os
import pwd
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass

from vmfork.actions.files import beginning
from vmfork.paths import Paths

_MAX_PROCESSES = 65536
_MAX_COMMAND_LINE = 64 * 1024
_MAX_SOCKETS = 4 * 1024 * 1024
_PAUSE_SEC = 0.02
# enum tcp_states of the kernel's include/net/tcp_states.h, as /proc/net/tcp shows it.
_TCP_LISTEN = "0A"


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    """One process. `image` differs from any other process's, and from its own after the next exec."""

    pid: int
    parent: int
    argv: tuple[str, ...]
    image: tuple[int, int, int]


def daemons(paths: Paths, program: str, *, owner: str | None = None) -> tuple[Process, ...]:
    """Every trusted process that runs the program at this absolute path, lowest process ID first.

    `owner` names an account whose processes count like root's.
    """
    wanted = os.path.realpath(program)
    uids = {"0", *_uid(owner)}
    name = os.path.basename(wanted)[:15]
    found = []
    for pid in _pids(paths):
        place = os.path.join(paths.processes, str(pid))
        if beginning(f"{place}/comm", 64).strip() in (name, os.path.basename(program)[:15]) and _is_trusted(
            paths, place, wanted, uids
        ):
            process = look(paths, pid)
            if process is not None:
                found.append(process)
    return tuple(found)


def children(paths: Paths, pid: int) -> tuple[Process, ...]:
    """The children of a process."""
    found = (look(paths, child) for child in _pids(paths))
    return tuple(child for child in found if child is not None and child.parent == pid)


def descendants(paths: Paths, pid: int) -> tuple[Process, ...]:
    """The children of a process, theirs, and so on, nearest first."""
    everybody = [process for process in (look(paths, one) for one in _pids(paths)) if process is not None]
    found: list[Process] = []
    parents = {pid}
    while parents:
        nearest = [process for process in everybody if process.parent in parents and process not in found]
        found += nearest
        parents = {process.pid for process in nearest}
    return tuple(found)


def look(paths: Paths, pid: int) -> Process | None:
    """One process, None if there is none with this ID."""
    place = os.path.join(paths.processes, str(pid))
    # proc(5): the name, in parentheses, may hold anything; fields are counted from behind it.
    fields = beginning(f"{place}/stat", 4096).rpartition(")")[2].split()
    # A process on its way out loses its address space (its size is 0) before it is called a zombie.
    if len(fields) < 26 or fields[0] in ("Z", "X") or fields[20] == "0":
        return None
    words = beginning(f"{place}/cmdline", _MAX_COMMAND_LINE).split("\0")
    return Process(
        pid=pid,
        parent=int(fields[1]),
        argv=tuple(words[:-1] if words and not words[-1] else words),
        # Start time, and the start of the stack: exec keeps the first and draws the second anew.
        image=(pid, int(fields[19]), int(fields[25])),
    )


def listens(paths: Paths, pid: int) -> bool:
    """Whether a process of this network namespace holds a TCP socket that takes connections."""
    doors = set()
    for table in ("tcp", "tcp6"):
        for line in beginning(os.path.join(paths.processes, "self/net", table), _MAX_SOCKETS).splitlines()[1:]:
            fields = line.split()
            if len(fields) > 9 and fields[3] == _TCP_LISTEN:
                doors.add(f"socket:[{fields[9]}]")
    place = os.path.join(paths.processes, str(pid), "fd")
    try:
        return any(_link(os.path.join(place, name)) in doors for name in os.listdir(place))
    except OSError:
        return False


def kill(process: Process, paths: Paths, *, timeout: float) -> bool:
    """End a process with SIGKILL, through a descriptor so that no other is hit; False if it is still there."""
    try:
        fd = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return True
    try:
        now = look(paths, process.pid)
        if now is not None and now.image == process.image:
            signal.pidfd_send_signal(fd, signal.SIGKILL)
    except ProcessLookupError:
        return True
    finally:
        os.close(fd)
    return wait_until(lambda: not _is_alive(process, paths), timeout=timeout)


def tell(process: Process, paths: Paths, number: signal.Signals) -> bool:
    """Send a signal to this very process; False if it is gone."""
    try:
        fd = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return False
    try:
        if not _is_alive(process, paths):
            return False
        signal.pidfd_send_signal(fd, number)
    except ProcessLookupError:
        return False
    finally:
        os.close(fd)
    return True


def wait_until(condition: Callable[[], object], *, timeout: float) -> bool:
    """Wait for something that gives no event; whether it came true in time."""
    end = time.monotonic() + timeout
    while not condition():
        if time.monotonic() >= end:
            return False
        time.sleep(_PAUSE_SEC)
    return True


def _is_alive(process: Process, paths: Paths) -> bool:
    now = look(paths, process.pid)
    return now is not None and now.image == process.image


def _uid(account: str | None) -> tuple[str, ...]:
    try:
        return (str(pwd.getpwnam(account).pw_uid),) if account else ()
    except KeyError:
        return ()


def _is_trusted(paths: Paths, place: str, program: str, allowed: set[str]) -> bool:
    status = beginning(f"{place}/status", 8192)
    uids = set(next((line.split()[1:] for line in status.splitlines() if line.startswith("Uid:")), []))
    if len(uids) != 1 or not uids <= allowed:
        return False
    try:
        # The kernel says "(deleted)" of a program that was replaced by an upgrade while it ran.
        if os.readlink(f"{place}/exe").removesuffix(" (deleted)") != program:
            return False
        return all(
            os.readlink(f"{place}/ns/{kind}") == os.readlink(os.path.join(paths.processes, f"self/ns/{kind}"))
            for kind in ("mnt", "net")
        )
    except OSError:
        return False


def _pids(paths: Paths) -> list[int]:
    try:
        return sorted(int(name) for name in os.listdir(paths.processes) if name.isdigit())[:_MAX_PROCESSES]
    except OSError:
        return []


def _link(path: str) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""
