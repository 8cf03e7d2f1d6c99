# SPDX-License-Identifier: Apache-2.0
"""What the idle daemon holds and does: memory, wake-ups, pages written after a restore, and how fast it starts."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

from bench import softdirty
from bench.edge import simple
from bench.place import (
    HERE,
    Daemon,
    build,
    can_copy,
    environment,
    fake_daemon,
    guest_python,
    real_daemon,
    running,
    scratch,
)
from bench.samples import Chapter, Series
from support.fakeguest import FakeGuest

Place = Callable[[], AbstractContextManager[Daemon]]


def memory_mib(pid: int) -> dict[str, float]:
    """Rss, Pss and what is private and dirty of one process, in MiB."""
    found: dict[str, float] = {}
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
        name, _, rest = line.partition(":")
        found[name] = int(rest.split()[0]) / 1024
    return found


def wake_ups(pid: int) -> int:
    """How often the process went to sleep, so far: what was woken up does that again once, however often it was robbed
    of its CPU in between.
    """
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("\nvoluntary_ctxt_switches:")[2].split()[0])


def measure(*, idle_sec: float, starts: int) -> Chapter:
    chapter = Chapter(name="footprint")
    reason = can_copy()
    place: Place = real_daemon if reason is None else fake_daemon
    where = "no root prefix, pyudev imported, logging to the journal; libsystemd comes with the first message"
    if reason is not None:
        where = f"below a root prefix, without pyudev and systemd-python ({reason})"
    rss, pss, private, later = [], [], [], []
    woken: dict[str, list[float]] = {"vmforkd": [], "c": [], "python": []}
    for _ in range(3):
        with place() as daemon:
            time.sleep(0.5)
            # Before the other two run: one of them shares the interpreter, and so takes over a part of the PSS.
            found = memory_mib(daemon.pid)
            rss.append(found["Rss"])
            pss.append(found["Pss"])
            private.append(found["Private_Dirty"])
            with _floors() as pids:
                pids["vmforkd"] = daemon.pid
                time.sleep(0.5)
                before = {name: wake_ups(pid) for name, pid in pids.items()}
                time.sleep(idle_sec / 3)
                for name, pid in pids.items():
                    woken[name].append((wake_ups(pid) - before[name]) * 180 / idle_sec)
            daemon.fork()
            later.append(memory_mib(daemon.pid)["Rss"])
    chapter.series += [
        Series(key="rss", what="detector, idle: RSS", unit="MiB", values=rss, budget=18.0, note=where),
        Series(key="pss", what="detector, idle: PSS", unit="MiB", values=pss, note=where),
        Series(key="rss-later", what="detector, after its first fork: RSS", unit="MiB", values=later),
        Series(key="private-dirty", what="detector, idle: private and written", unit="MiB", values=private, note=where),
        Series(
            key="wake-ups",
            what="detector, idle: wake-ups per minute, live edge",
            unit="/min",
            values=woken["vmforkd"],
            budget=0.0,
            note=f"voluntary context switches in {idle_sec / 3:g} s, three times; those below beside it",
        ),
    ]
    for name, what in (("c", "C reference"), ("python", "bare Python loop")):
        idle = f"{what}, idle: wake-ups per minute"
        chapter.series.append(Series(key=f"wake-ups-{name}", what=idle, unit="/min", values=woken[name], peer=True))
    chapter.series.append(bare_memory())
    chapter.series += start_times(starts, real=reason is None)
    chapter.series += written_pages()
    return chapter


@contextlib.contextmanager
def _floors() -> Iterator[dict[str, int]]:
    """The C reference and the bare Python loop, each waiting for the same line; their process IDs."""
    with scratch() as name, contextlib.ExitStack() as stack:
        directory = Path(name)
        commands = {
            "c": [str(build("reference.c", directory / "reference"))],
            "python": [guest_python(), "-I", str(HERE / "bare.py")],
        }
        yield {key: stack.enter_context(simple(directory, key, line)).pid for key, line in commands.items()}


def bare_memory() -> Series:
    """The same interpreter with the third-party libraries and nothing of vmfork: the floor."""
    program = (
        "import sys, time, pyudev, systemd.daemon, systemd.journal, configparser, logging, selectors, json;"
        "c = pyudev.Monitor.from_netlink(pyudev.Context(), source='kernel'); print('up', flush=True); time.sleep(60)"
    )
    values = []
    for _ in range(3):
        with running([guest_python(), "-I", "-c", program], stdout=subprocess.PIPE) as child:
            assert child.stdout is not None
            if not child.stdout.readline():
                break
            values.append(memory_mib(child.pid)["Rss"])
    return Series(
        key="rss-floor",
        what="bare Python with pyudev, systemd-python, configparser, logging: RSS",
        unit="MiB",
        values=values or [0.0],
        peer=True,
    )


def start_times(count: int, *, real: bool) -> list[Series]:
    """Milliseconds from exec to READY=1, below a root prefix, and a bare interpreter beside it."""
    starts, bare = [], []
    for _ in range(count):
        starts.append(_start_ms())
        begin = time.perf_counter_ns()
        subprocess.run([guest_python(), "-I", "-c", "pass"], check=True)
        bare.append((time.perf_counter_ns() - begin) / 1e6)
    found = [
        Series(key="start", what="detector start to READY", unit="ms", values=starts, budget=150.0),
        Series(key="start-bare", what="bare Python, start to end", unit="ms", values=bare, peer=True),
    ]
    if real:
        values = [_real_start_ms() for _ in range(max(3, count // 2))]
        note = "in namespaces, with pyudev and systemd-python; includes making the namespaces"
        found.append(
            Series(
                key="start-real", what="detector start to READY, no root prefix", unit="ms", values=values, note=note
            )
        )
    return found


def ready_ms(server: socket.socket, begin: int) -> float:
    """Milliseconds from `begin`, of time.perf_counter_ns(), to the READY=1 that comes in."""
    server.settimeout(30)
    while b"READY=1" not in server.recv(4096):
        pass
    return (time.perf_counter_ns() - begin) / 1e6


def _start_ms() -> float:
    with scratch() as name, FakeGuest(Path(name) / "guest") as guest:
        return start_ms(guest)


def start_ms(guest: FakeGuest) -> float:
    """One start below a guest's root."""
    path = f"{guest.root}.notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as server:
        server.bind(path)
        command = [guest_python(), "-m", "vmfork.daemon", "--root", str(guest.root)]
        begin = time.perf_counter_ns()
        with running(command, env=environment(NOTIFY_SOCKET=path), stderr=subprocess.DEVNULL):
            value = ready_ms(server, begin)
    os.unlink(path)
    return value


def _real_start_ms() -> float:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as server:
        begin = 0

        def listen(directory: Path) -> None:
            nonlocal begin
            server.bind(str(directory / "guest/run/notify"))
            begin = time.perf_counter_ns()

        with real_daemon(notify=Path("/run/notify"), more=listen):
            return ready_ms(server, begin)


def written_pages() -> list[Series]:
    """Pages that the daemon writes to after a restore: each is a private copy in every clone."""
    idle, forked = [], []
    for _ in range(3):
        with fake_daemon() as daemon:
            daemon.fork()
            time.sleep(0.3)
            if not softdirty.forget(daemon.pid):
                return []
            time.sleep(2)
            idle.append(float(softdirty.count(daemon.pid)))
            softdirty.forget(daemon.pid)
            daemon.fork()
            time.sleep(0.3)
            forked.append(float(softdirty.count(daemon.pid)))
    if not any(forked):
        return []
    return [
        Series(key="written-idle", what="pages written to in 2 s, nothing happens", unit="pages", values=idle),
        Series(key="written-fork", what="pages written to by one fork and its reaction", unit="pages", values=forked),
    ]
