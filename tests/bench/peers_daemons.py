# SPDX-License-Identifier: Apache-2.0
"""How vmforkd, udev, acpid and the QEMU guest agent are started, given scripts, and told of an event.

Each is the main process of a copy of this machine, and is up when its socket is there, vmforkd when it says so.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from bench.footprint import ready_ms
from bench.peers_layer import Running, inside, layer, put_scripts
from bench.place import copy_script, pinned, real_daemon, running, scratch, until

# A uevent in this network namespace only: root may have the kernel broadcast one (Linux 4.18 or newer).
_INJECT = """
import socket, struct, sys, time
body = b"change@/devices/virtual/mem/null\\0ACTION=change\\0DEVPATH=/devices/virtual/mem/null\\0SUBSYSTEM=mem\\0"
body += b"DEVNAME=/dev/null\\0MAJOR=1\\0MINOR=3\\0"
with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 15) as sender:
    sender.bind((0, 0))
    for line in sys.stdin:
        begin = time.monotonic_ns()
        sender.sendto(struct.pack("=IHHII", 16 + len(body), 16, 5, 0, 0) + body, (0, 0))
        print(begin, flush=True)
"""


@contextlib.contextmanager
def vmforkd(program: Path, count: int) -> Iterator[Running]:
    """The scripts are hooks of the admin's, of equal order."""
    scripts: list[Path] = []
    begin = 0

    def prepare(directory: Path) -> None:
        nonlocal begin
        hooks = directory / "upper/etc/vmfork/hooks.d"
        hooks.mkdir(parents=True)
        for number in range(count):
            scripts.append(hooks / f"50-hook{number:04}")
            shutil.copy(program, scripts[-1])
            scripts[-1].chmod(0o755)
        ready.bind(str(directory / "guest/run/notify"))
        begin = time.perf_counter_ns()

    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ready,
        real_daemon(cpu=1, notify=Path("/run/notify"), more=prepare) as daemon,
    ):
        started = ready_ms(ready, begin)

        def fire() -> int:
            daemon.guest.set_generation_id(os.urandom(16))
            moment = time.monotonic_ns()
            daemon.guest.reseed_line()
            return moment

        yield Running(
            pid=daemon.pid,
            fire=fire,
            scripts=scripts,
            started_ms=started,
            rest=lambda: daemon.settled(daemon.content().generation),
        )


@contextlib.contextmanager
def udev(program: Path, count: int) -> Iterator[Running]:
    with scratch() as name, contextlib.ExitStack() as stack:
        directory = Path(name)
        scripts = put_scripts(directory, program, count)
        rules = directory / "guest/run/udev/rules.d"
        rules.mkdir(parents=True)
        lines = [f'SUBSYSTEM=="mem", RUN+="{inside(path)}"' for path in scripts]
        (rules / "99-bench.rules").write_text("\n".join(lines) + "\n")
        command = copy_script(directory, ["/lib/systemd/systemd-udevd"], lower=layer(directory))
        # udevd wants the real sysfs; all that it is told is told in its own network namespace.
        command[-1] = command[-1].replace(f"mount --bind {directory}/guest/sys", "mount --bind /sys")
        begin = time.perf_counter_ns()
        log = stack.enter_context(open(directory / "log", "wb"))
        child = stack.enter_context(running(pinned(1, command), stderr=log, stdout=log))
        control = directory / "guest/run/udev/control"
        until(control.exists, "udevd is up")
        started = (time.perf_counter_ns() - begin) / 1e6
        nsenter = ["nsenter", f"--net=/proc/{child.pid}/ns/net", sys.executable, "-c", _INJECT]
        injector = stack.enter_context(
            running(nsenter, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        )

        def fire() -> int:
            assert injector.stdin is not None
            assert injector.stdout is not None
            injector.stdin.write(b"\n")
            injector.stdin.flush()
            return int(injector.stdout.readline())

        yield Running(pid=child.pid, fire=fire, scripts=scripts, started_ms=started)


@contextlib.contextmanager
def acpid(program: Path, count: int) -> Iterator[Running]:
    with scratch() as name, contextlib.ExitStack() as stack:
        directory = Path(name)
        scripts = put_scripts(directory, program, count)
        run = directory / "guest/run"
        (run / "rules").mkdir()
        for path in scripts:
            (run / "rules" / path.name).write_text(f"event=button/fork.*\naction={inside(path)}\n")
        os.mkfifo(run / "events")
        events = os.open(run / "events", os.O_RDWR | os.O_NONBLOCK)
        stack.callback(os.close, events)
        inner = [
            "acpid",
            "-f",
            "-e",
            "/run/events",
            "-c",
            "/run/rules",
            "-s",
            "/run/acpid.socket",
            "-p",
            "/run/acpid.pid",
        ]
        command = copy_script(directory, inner, lower=layer(directory))
        begin = time.perf_counter_ns()
        log = stack.enter_context(open(directory / "log", "wb"))
        child = stack.enter_context(running(pinned(1, command), stderr=log, stdout=log))
        until((run / "acpid.socket").exists, "acpid is up")
        started = (time.perf_counter_ns() - begin) / 1e6

        def fire() -> int:
            moment = time.monotonic_ns()
            os.write(events, b"button/fork FORK 00000080 00000000\n")
            return moment

        yield Running(pid=child.pid, fire=fire, scripts=scripts, started_ms=started)


@contextlib.contextmanager
def qemu_ga(program: Path, count: int) -> Iterator[Running]:
    with scratch() as name, contextlib.ExitStack() as stack:
        directory = Path(name)
        scripts = put_scripts(directory, program, count)
        run = directory / "guest/run"
        hook = run / "fsfreeze-hook"
        # What QEMU's own fsfreeze-hook does, less its log: each program of a directory in turn.
        hook.write_text('#!/bin/sh\nfor program in /run/scripts/????; do "$program" "$@"; done\n')
        hook.chmod(0o755)
        inner = [
            "qemu-ga",
            "-m",
            "unix-listen",
            "-p",
            "/run/ga.sock",
            "-F/run/fsfreeze-hook",
            "-t",
            "/run",
            "-f",
            "/run/ga.pid",
        ]
        command = copy_script(directory, inner, lower=layer(directory))
        # It may run hooks, and must not be able to freeze anything.
        command[-1] = command[-1].replace("--bounding-set=-sys_time", "--bounding-set=-sys_time,-sys_admin")
        begin = time.perf_counter_ns()
        log = stack.enter_context(open(directory / "log", "wb"))
        child = stack.enter_context(running(pinned(1, command), stderr=log, stdout=log))
        until((run / "ga.sock").exists, "qemu-ga is up")
        started = (time.perf_counter_ns() - begin) / 1e6
        client = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        client.connect(str(run / "ga.sock"))
        client.settimeout(30)
        answers = client.makefile("rb")

        def call(command: str, **arguments: object) -> bytes:
            client.sendall(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")
            return answers.readline()

        def fire() -> int:
            moment = time.monotonic_ns()
            # Names no mounted file system, so only the hook runs; undone at once, which runs it again. Each of the
            # calls is answered when the hook has ended.
            call("guest-fsfreeze-freeze-list", mountpoints=["/run/no-such-place"])
            call("guest-fsfreeze-thaw")
            return moment

        yield Running(pid=child.pid, fire=fire, scripts=scripts, started_ms=started)
