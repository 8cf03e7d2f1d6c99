# SPDX-License-Identifier: Apache-2.0
"""Finds and ends every process that a hook started, daemons that left its session and lost their parents included.

The reactor is a child subreaper (prctl(2)), so a process whose parent ended becomes the reactor's child instead of
init's and stays in reach. Which hook an orphan belongs to is told by its session, its environment at exec time, or
the hook's output pipe; an orphan that hides all three is a hook's only if that runs side by side with no other one. A
process is named by its id and start time, and signalled through a pidfd, so that a reused id is never hit.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from vmfork.paths import Paths
from vmfork.reactor.environment import FORK_TOKEN, HOOK, ROOT

# Of the running system even below a fake root: these are the processes that hooks really are.
_PROC = Paths().processes
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_ENVIRON_MAX = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    """One live process; `start` is its start time in clock ticks since boot."""

    pid: int
    parent: int
    session: int
    start: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """What tells a hook's processes: its first process (also its session), name, fork token and pipe's inode.

    `root` is the root prefix below which its vmfork works: another one on the same machine has hooks of the same names,
    and around a snapshot no token.
    """

    pid: int
    name: str
    token: str | None
    root: str
    pipe: int | None = None


def become_subreaper() -> None:
    """From now on orphaned descendants become this process's children."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def die_with(parent: int, number: signal.Signals = signal.SIGTERM) -> bool:
    """Be sent this signal when the parent process ends; False if it already has."""
    _prctl(_PR_SET_PDEATHSIG, number)
    return os.getppid() == parent


def _prctl(option: int, value: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0) != 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))


def processes() -> dict[int, Process]:
    """Every process that is not a zombie, by id."""
    found = {}
    for name in os.listdir(_PROC):
        if name.isdigit():
            process = read_process(int(name))
            if process is not None:
                found[process.pid] = process
    return found


def read_process(pid: int) -> Process | None:
    """The process with this id, None if it is gone or a zombie, or hidden from us; OSError where that is not known."""
    try:
        with open(f"{_PROC}/{pid}/stat", "rb", buffering=0) as file:
            data = file.read(4096)
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        # Nothing else: for lack of a descriptor a process that runs must not look like one that has ended.
        return None
    # The command's name may hold spaces and parentheses; the fields begin after its last one.
    fields = data[data.rfind(b")") + 2 :].split()
    if len(fields) < 20 or fields[0] in (b"Z", b"X"):
        return None
    return Process(pid=pid, parent=int(fields[1]), session=int(fields[3]), start=int(fields[19]))


def has_children() -> bool:
    """Whether this process has any child, a zombie too; far cheaper than to list them."""
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True


def reap(spared: Iterable[int]) -> None:
    """Collect orphans that have ended; stops at the first one of `spared`, which somebody else waits for."""
    while True:
        try:
            info = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if info is None or info.si_pid in spared:
                return
            os.waitid(os.P_PID, info.si_pid, os.WEXITED | os.WNOHANG)
        except ChildProcessError:
            return


def members(mark: Mark, table: Mapping[int, Process], orphans: Iterable[Process], *, alone: bool) -> list[Process]:
    """The processes of one hook in `table`; with `alone` also every orphan that names no other hook."""
    chosen = {process.pid: process for process in table.values() if mark.pid in (process.pid, process.session)}
    for process in orphans:
        environment = _environment(process.pid)
        nobodys = not any(entry.startswith(f"{HOOK}=".encode()) for entry in environment)
        if _names(environment, mark) or (alone and nobodys) or holds_pipe(process.pid, mark):
            chosen[process.pid] = process
    children: dict[int, list[Process]] = {}
    for process in table.values():
        children.setdefault(process.parent, []).append(process)
    pending = list(chosen.values())
    while pending:
        for child in children.get(pending.pop().pid, ()):
            if child.pid not in chosen:
                chosen[child.pid] = child
                pending.append(child)
    chosen.pop(os.getpid(), None)
    return list(chosen.values())


def carries(pid: int, mark: Mark) -> bool:
    """Whether a process was started with the hook's environment, or below one that was.

    Without a token it must also live in our PID namespace: a container may run a vmfork of its own.
    """
    return _names(_environment(pid), mark) and (
        mark.token is not None or _link(f"{_PROC}/{pid}/ns/pid") == _own_space()
    )


def _own_space() -> str:
    return _link(f"{_PROC}/self/ns/pid")


def _names(environment: list[bytes], mark: Mark) -> bool:
    wanted = {HOOK: mark.name, FORK_TOKEN: mark.token, ROOT: mark.root or None}
    return all(_value(environment, name) == value for name, value in wanted.items())


def _value(environment: list[bytes], name: str) -> str | None:
    prefix = f"{name}=".encode()
    return next((os.fsdecode(entry[len(prefix) :]) for entry in environment if entry.startswith(prefix)), None)


def _environment(pid: int) -> list[bytes]:
    try:
        with open(f"{_PROC}/{pid}/environ", "rb", buffering=0) as file:
            return file.read(_ENVIRON_MAX).split(b"\0")
    except OSError:
        return []


def holds_pipe(pid: int, mark: Mark) -> bool:
    """Whether a process holds the hook's output pipe open."""
    return mark.pipe is not None and _holds(pid, mark.pipe)


def _holds(pid: int, pipe: int) -> bool:
    folder = f"{_PROC}/{pid}/fd"
    try:
        return any(_link(f"{folder}/{name}") == f"pipe:[{pipe}]" for name in os.listdir(folder))
    except OSError:
        return False


def _link(path: str) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""


def send(process: Process, number: signal.Signals) -> None:
    """Signal exactly this process; one that has gone meanwhile is no error."""
    try:
        descriptor = os.pidfd_open(process.pid)
    except OSError:
        return
    try:
        now = read_process(process.pid)
        if now is not None and now.start == process.start:
            signal.pidfd_send_signal(descriptor, number)
    except ProcessLookupError:
        return
    finally:
        os.close(descriptor)


def kill_newborn(pid: int) -> None:
    """Kill a child that has just begun, and the group that it leads if it leads one yet; returns when it is gone."""
    # The id stays its own until it is waited for.
    os.kill(pid, signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def kill_until_gone(find: Callable[[], list[Process]], *, seconds: float) -> list[Process]:
    """Kill what `find()` returns until it finds nothing more; what is left after `seconds` is returned."""
    deadline = time.monotonic() + seconds
    while left := find():
        for process in left:
            send(process, signal.SIGKILL)
        if time.monotonic() > deadline:
            return left
    return []
