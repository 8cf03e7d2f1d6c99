# SPDX-License-Identifier: Apache-2.0
"""Crowds: many hooks of equal order beside xargs -P, many forks in a row, many subscribers."""

from __future__ import annotations

import os
import resource
import selectors
import socket
import subprocess
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from bench.footprint import memory_mib
from bench.place import Daemon, build, fake_daemon, scratch, until
from bench.reaction import put_hook, stamps
from bench.samples import Chapter, Series, ratio

_SUBSCRIBE = b'{"method":"io.vmfork.Subscribe","parameters":{"track":false,"after":null},"more":true}\0'


@dataclass(slots=True, kw_only=True)
class HookTimes:
    """Milliseconds from the edge to the first hook's first instruction and to settled; xargs beside it."""

    firsts: list[float] = field(default_factory=list)
    ends: list[float] = field(default_factory=list)
    xargs: list[float] = field(default_factory=list)


def hook_times(count: int, rounds: int) -> HookTimes:
    """Reactions to `count` hooks of equal order, and as many runs of xargs -P over the same program, in turns."""
    found = HookTimes()
    with scratch() as name, fake_daemon() as daemon:
        program = build("stamp.c", Path(name) / "stamp", "-static")
        hooks = [put_hook(daemon.guest, program, f"50-hook{number:04}") for number in range(count)]
        for done in range(rounds):
            generation = daemon.content().generation + 1
            daemon.guest.set_generation_id(os.urandom(16))
            begin = time.monotonic_ns()
            daemon.guest.reseed_line()
            daemon.settled(generation)
            end = time.monotonic_ns()
            moments = [stamps(hook)[done] for hook in hooks]
            found.firsts.append((min(moments) - begin) / 1e6)
            found.ends.append((end - begin) / 1e6)
            time.sleep(0.05)
            found.xargs.append(xargs_ms(program, count))
    return found


def xargs_ms(program: Path, count: int) -> float:
    """The same program as often, as many at a time as the reactor would."""
    begin = time.perf_counter_ns()
    subprocess.run(["xargs", "-n1", "-P128", str(program)], input=b"after-fork\n" * count, check=True)
    return (time.perf_counter_ns() - begin) / 1e6


def many_hooks(count: int, rounds: int) -> list[Series]:
    times = hook_times(count, rounds)
    # What starting a reactor costs is another row of the table; here it is the hooks themselves and their reports.
    spans = [end - first for first, end in zip(times.firsts, times.ends, strict=True)]
    own = Series(key="hooks", what=f"{count} hooks of equal order, first start to settled", unit="ms", values=spans)
    other = Series(key="xargs", what=f"xargs -P over {count} of them", unit="ms", values=times.xargs, peer=True)
    return [own, other, ratio("hooks-ratio", f"{count} hooks over xargs -P", own, other, budget=2.0)]


def many_forks(count: int) -> list[Series]:
    """Forks in a row, each awaited on the page, reactions superseded or not; what the daemon's memory grew."""
    with fake_daemon() as daemon:
        for _ in range(20):
            daemon.fork()
        before = memory_mib(daemon.pid)["Rss"]
        start = daemon.content().generation
        begin = time.perf_counter_ns()
        for number in range(count):
            daemon.guest.fork(os.urandom(16))
            until(lambda wanted=start + number + 1: daemon.content().generation >= wanted, "fork", pause=0.0002)  # type: ignore[misc]
        seconds = (time.perf_counter_ns() - begin) / 1e9
        daemon.settled(start + count)
        lost = start + count - daemon.content().generation
        after = memory_mib(daemon.pid)["Rss"]
    return [
        Series(key="forks-lost", what=f"{count} forks in a row: lost", unit="", values=[float(lost)], budget=0.0),
        Series(
            key="forks-rss", what=f"{count} forks in a row: RSS growth", unit="MiB", values=[after - before], budget=1.0
        ),
        Series(key="forks-rate", what=f"{count} forks in a row: forks per second", unit="/s", values=[count / seconds]),
    ]


def _allow_descriptors(wanted: int) -> int:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, wanted)), hard))
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


class Crowd:
    """Subscribers of a daemon; each is one connection of this process."""

    def __init__(self, daemon: Daemon, stack: ExitStack) -> None:
        self.daemon = daemon
        self._stack = stack
        self._selector = selectors.DefaultSelector()
        self._sockets: list[socket.socket] = []

    def grow(self, count: int) -> int:
        """Connect until there are `count`, or the daemon refuses; how many there are."""
        path = self.daemon.guest.paths.public_socket
        while len(self._sockets) < count:
            client = self._stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            client.settimeout(10)
            try:
                client.connect(path)
                client.sendall(_SUBSCRIBE)
                hello = client.recv(65536)
            except OSError:
                break
            if b'"hello"' not in hello:
                break
            self._sockets.append(client)
            self._selector.register(client, selectors.EVENT_READ)
        return len(self._sockets)

    def told_ms(self) -> float:
        """Milliseconds from the edge until every one has the notice of the fork."""
        waiting = set(self._sockets)
        generation = self.daemon.content().generation + 1
        self.daemon.guest.set_generation_id(os.urandom(16))
        begin = last = time.perf_counter_ns()
        self.daemon.guest.reseed_line()
        while waiting:
            for key, _ in self._selector.select(10):
                client = key.fileobj
                assert isinstance(client, socket.socket)
                if b'"fork"' in client.recv(65536) and client in waiting:
                    waiting.remove(client)
                    last = time.perf_counter_ns()
        self.daemon.settled(generation)
        time.sleep(0.05)
        for key, _ in self._selector.select(0):
            assert isinstance(key.fileobj, socket.socket)
            key.fileobj.recv(65536)
        return (last - begin) / 1e6


def many_subscribers(count: int, rounds: int) -> tuple[list[Series], list[str]]:
    _allow_descriptors(count + 200)
    with fake_daemon() as daemon, ExitStack() as stack:
        crowd = Crowd(daemon, stack)
        have = crowd.grow(count)
        values = [crowd.told_ms() for _ in range(rounds)]
    note = "one process reads them all" if have == count else f"only {have} were let in for one user"
    return [
        Series(
            key="subscribers",
            what=f"{have} subscribers, edge to the last told",
            unit="ms",
            values=values,
            budget=50.0,
            note=note,
        )
    ], ([] if have == count else [f"{have} of {count} subscribers were let in: the limit for one user."])


def measure(*, rounds: int, forks: int) -> Chapter:
    chapter = Chapter(name="crowd")
    chapter.series += many_hooks(100, rounds)
    chapter.series += many_forks(forks)
    more, remarks = many_subscribers(1000, rounds)
    chapter.series += more
    chapter.remarks += remarks
    return chapter
