# SPDX-License-Identifier: Apache-2.0
"""From the kernel's line to a hook's first instruction, and to the end of the whole default reaction."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from bench.place import (
    Daemon,
    build,
    can_copy,
    environment,
    fake_daemon,
    guest_python,
    real_daemon,
    scratch,
    ship_hooks,
    until,
)
from bench.samples import Chapter, Series
from support.fakeguest import FakeGuest
from vmfork import page


def put_hook(guest: FakeGuest, program: Path, name: str) -> Path:
    """A compiled program as a hook of the admin."""
    target = Path(guest.paths.hooks_etc) / name
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(program, target)
    target.chmod(0o755)
    return target


def stamps(path: Path) -> list[int]:
    """The moments that stamp.c left, CLOCK_MONOTONIC ns."""
    try:
        data = Path(f"{path}.stamp").read_bytes()
    except FileNotFoundError:
        return []
    return [one for (one,) in struct.iter_unpack("Q", data)]


def one_hook(
    rounds: int, name: str = "00-stamp", prepare: Callable[[FakeGuest], None] | None = None
) -> tuple[list[float], list[float]]:
    """Milliseconds from the edge to the first instruction of one hook of this name, and to settled."""
    hooks, ends = [], []
    with scratch() as directory:
        program = build("stamp.c", Path(directory) / "stamp", "-static")
        with fake_daemon(prepare=prepare) as daemon:
            hook = put_hook(daemon.guest, program, name)
            for number in range(rounds):
                generation = daemon.content().generation + 1
                daemon.guest.set_generation_id(os.urandom(16))
                begin = time.monotonic_ns()
                daemon.guest.reseed_line()
                until(lambda wanted=number: len(stamps(hook)) > wanted, "hook", pause=0.001)  # type: ignore[misc]
                hooks.append((stamps(hook)[-1] - begin) / 1e6)
                daemon.settled(generation)
                ends.append((time.monotonic_ns() - begin) / 1e6)
                time.sleep(0.1)
    return hooks, ends


def first_hook(rounds: int) -> list[Series]:
    hooks, ends = one_hook(rounds)
    return [
        Series(key="first-hook", what="edge to first hook's first instruction", unit="ms", values=hooks, budget=80.0),
        Series(key="one-hook", what="edge to settled, one hook", unit="ms", values=ends),
    ]


def interpreter_share(rounds: int) -> list[Series]:
    """What of it is the start of Python, and what the imports of the reactor."""
    bare: list[float] = []
    imports: list[float] = []
    program = "import sys; sys.argv = ['vmforkctl']; import vmfork.cli, vmfork.cli.hooks, vmfork.reactor.session"
    for _ in range(rounds):
        for values, text in ((bare, "pass"), (imports, program)):
            begin = time.perf_counter_ns()
            subprocess.run([guest_python(), "-c", text], env=environment(), check=True)
            values.append((time.perf_counter_ns() - begin) / 1e6)
    return [
        Series(key="reactor-bare", what="of this: bare Python, start to end", unit="ms", values=bare),
        Series(key="reactor-imports", what="of this: Python with the reactor's imports", unit="ms", values=imports),
    ]


def shipped(guest: FakeGuest) -> None:
    """With the hooks of the package."""
    ship_hooks(Path(guest.paths.hooks_lib))


def whole(rounds: int) -> tuple[list[Series], list[str]]:
    """The shipped hooks, from the line to settled."""
    found, remarks = [], []

    with fake_daemon(prepare=shipped) as daemon:
        found.append(
            Series(
                key="reaction-fake",
                what="whole default reaction, below a root prefix",
                unit="ms",
                values=_reactions(daemon, rounds),
                budget=500.0,
            )
        )
    reason = can_copy()
    if reason is None:
        with real_daemon(hooks=True) as daemon:
            values = _reactions(daemon, rounds)
            found.append(
                Series(
                    key="reaction-real",
                    what="whole default reaction, for real, nothing to renew",
                    unit="ms",
                    values=values,
                    budget=500.0,
                    note="the shipped hooks in a copy of this machine: real RNG and files, no service manager, no link",
                )
            )
    else:
        remarks.append(f"The default reaction was not run for real: {reason}.")
    return found, remarks


def _reactions(daemon: Daemon, rounds: int) -> list[float]:
    values = []
    for _ in range(rounds):
        begin = time.monotonic_ns()
        daemon.fork()
        values.append((time.monotonic_ns() - begin) / 1e6)
        if daemon.content().state == page.STATE_FAILED:
            print("bench: a shipped hook failed", file=sys.stderr)
        time.sleep(0.1)
    return values


def measure(rounds: int) -> Chapter:
    chapter = Chapter(name="reaction")
    chapter.series += first_hook(rounds)
    chapter.series += interpreter_share(rounds)
    more, remarks = whole(max(5, rounds // 3))
    chapter.series += more
    chapter.remarks += remarks
    return chapter
