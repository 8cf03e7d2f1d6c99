# SPDX-License-Identifier: Apache-2.0
"""Others that run scripts when something happens: udev, acpid, the QEMU guest agent; and vmfork, on the same work.

An event arrives, N scripts run; each is a copy of stamp.c, so what is timed is who starts it. All run in the same kind
of copy-on-write copy of this machine, on the same CPU, with the programs that Debian packages. Those are installed into
a layer of their own below build/, so the machine itself stays as it is.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from bench.crowd import hook_times
from bench.footprint import memory_mib, wake_ups
from bench.place import TOP, build, can_copy, copy_script, pinned, real_daemon, running, scratch, until
from bench.reaction import stamps
from bench.samples import Chapter, Curve, Series

PACKAGES = ("udev", "acpid", "qemu-guest-agent")
COUNTS = (1, 10, 100)
_LAYER = TOP / "build/bench-peers"

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


def install() -> str | None:
    """Put the peers into a layer over this machine; why that cannot be, None where it is done."""
    if (_LAYER / "done").exists():
        return None
    if shutil.which("apt-get") is None:
        return "needs apt-get"
    for name in ("upper", "work", "root"):
        (_LAYER / name).mkdir(parents=True, exist_ok=True)
    root = shlex.quote(str(_LAYER / "root"))
    script = f"""set -e
mount -t overlay o -o lowerdir=/,upperdir={_LAYER}/upper,workdir={_LAYER}/work {root}
mount -t proc proc {root}/proc; mount -t tmpfs t {root}/run; mount -t tmpfs t {root}/sys; mount --bind /dev {root}/dev
printf '#!/bin/sh\\nexit 101\\n' > {root}/usr/sbin/policy-rc.d; chmod 755 {root}/usr/sbin/policy-rc.d
exec chroot {root} apt-get install -y -qq --no-install-recommends -o APT::Sandbox::User=root {" ".join(PACKAGES)}"""
    command = ["unshare", "--mount", "--propagation", "private", "sh", "-c", script]
    more = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    try:
        done = subprocess.run(command, env=more, capture_output=True, text=True, check=False, timeout=600)
    except subprocess.TimeoutExpired:
        return "apt-get took too long"
    if done.returncode != 0:
        return f"apt-get cannot install {', '.join(PACKAGES)} here"
    (_LAYER / "done").touch()
    return None


@dataclass(slots=True, kw_only=True)
class Running:
    """A peer that is up: `fire` makes one event and returns its moment, `started_ms` is how long the start took."""

    pid: int
    fire: Callable[[], int]
    scripts: list[Path]
    started_ms: float


def _scripts(directory: Path, program: Path, count: int) -> list[Path]:
    """Copies of the program in the copy's /run: the paths as this process sees them."""
    place = directory / "guest/run/scripts"
    place.mkdir(parents=True, exist_ok=True)
    made = []
    for number in range(count):
        target = place / f"{number:04}"
        shutil.copy(program, target)
        target.chmod(0o755)
        made.append(target)
    return made


def layer(directory: Path) -> str:
    """The lower directories of a copy with the peers: a layer must not lie in another one's file system."""
    copy = directory / "layer"
    subprocess.run(["cp", "-a", str(_LAYER / "upper"), str(copy)], check=True)
    return f"{copy}:/"


def _inside(path: Path) -> str:
    return f"/run/scripts/{path.name}"


@contextlib.contextmanager
def udev(program: Path, count: int) -> Iterator[Running]:
    with scratch() as name, contextlib.ExitStack() as stack:
        directory = Path(name)
        scripts = _scripts(directory, program, count)
        rules = directory / "guest/run/udev/rules.d"
        rules.mkdir(parents=True)
        lines = [f'SUBSYSTEM=="mem", RUN+="{_inside(path)}"' for path in scripts]
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
        scripts = _scripts(directory, program, count)
        run = directory / "guest/run"
        (run / "rules").mkdir()
        for path in scripts:
            (run / "rules" / path.name).write_text(f"event=button/fork.*\naction={_inside(path)}\n")
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
        begin = time.perf_counter_ns()
        log = stack.enter_context(open(directory / "log", "wb"))
        command = copy_script(directory, inner, lower=layer(directory))
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
        scripts = _scripts(directory, program, count)
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
            # Names no mounted file system, so only the hook runs; undone at once, which runs it again.
            call("guest-fsfreeze-freeze-list", mountpoints=["/run/no-such-place"])
            for path in scripts:
                until(lambda wanted=path: bool(stamps(wanted)), "hook")  # type: ignore[misc]
            call("guest-fsfreeze-thaw")
            return moment

        yield Running(pid=child.pid, fire=fire, scripts=scripts, started_ms=started)


PEERS: dict[str, tuple[str, Callable[[Path, int], contextlib.AbstractContextManager[Running]]]] = {
    "udev": ("systemd-udevd, RUN rules", udev),
    "acpid": ("acpid", acpid),
    "qemu-ga": ("qemu-ga, fsfreeze hook", qemu_ga),
}


def _one(running_peer: Running) -> tuple[float, float]:
    """Milliseconds from one event to the first and the last script."""
    for path in running_peer.scripts:
        Path(f"{path}.stamp").unlink(missing_ok=True)
    begin = running_peer.fire()
    for path in running_peer.scripts:
        until(lambda wanted=path: bool(stamps(wanted)), "script", seconds=20)  # type: ignore[misc]
    moments = [stamps(path)[0] for path in running_peer.scripts]
    return (min(moments) - begin) / 1e6, (max(moments) - begin) / 1e6


def measure(rounds: int) -> Chapter:
    chapter = Chapter(name="peers")
    reason = can_copy() or install()
    if reason is not None:
        chapter.remarks.append(f"No peer was measured: {reason}.")
        return chapter
    chapter.remarks.append(
        "vmforkd starts a fresh, unsandboxed Python process for each fork, the reactor: that is nearly all of its time"
        " to the first script, whatever their number. The others start scripts themselves, one after the other; vmfork"
        " runs those of equal order side by side."
    )
    chapter.remarks.append(
        "networkd-dispatcher and NetworkManager's dispatcher need a system bus and a network manager that announces"
        " something; they were not run."
    )
    with scratch() as name:
        program = build("stamp.c", Path(name) / "stamp", "-static")
        chapter.curves.append(_vmfork(chapter, rounds))
        for key, (title, start) in PEERS.items():
            try:
                chapter.curves.append(_peer(chapter, key, title, lambda n, s=start: s(program, n), rounds))  # type: ignore[misc]
            except (TimeoutError, OSError) as error:
                chapter.remarks.append(f"{title} did not work here: {error}.")
    return chapter


def _vmfork(chapter: Chapter, rounds: int) -> Curve:
    title = "vmfork, hooks of equal order"
    points = []
    for count in COUNTS:
        times = hook_times(count, rounds)
        points.append((float(count), Series(key="", what="", unit="ms", values=times.lasts).median))
        if count == 1:
            chapter.series.append(
                Series(key="first-vmfork", what=f"{title}: event to first script", unit="ms", values=times.firsts)
            )
    with real_daemon(cpu=1) as daemon:
        _idle(chapter, "vmfork", "vmforkd", daemon.pid, peer=False)
    return Curve(key="last-vmfork", what=title, over="scripts", unit="ms", points=points)


def _peer(
    chapter: Chapter,
    key: str,
    title: str,
    start: Callable[[int], contextlib.AbstractContextManager[Running]],
    rounds: int,
) -> Curve:
    points, started = [], []
    for count in COUNTS:
        with start(count) as peer:
            started.append(peer.started_ms)
            found = [_one(peer) for _ in range(rounds)]
            points.append((float(count), Series(key="", what="", unit="ms", values=[last for _, last in found]).median))
            if count == 1:
                firsts = [first for first, _ in found]
                chapter.series.append(
                    Series(
                        key=f"first-{key}", what=f"{title}: event to first script", unit="ms", values=firsts, peer=True
                    )
                )
                _idle(chapter, key, title, peer.pid, peer=True)
    chapter.series.append(
        Series(
            key=f"start-{key}",
            what=f"{title}: start to listening",
            unit="ms",
            values=started,
            peer=True,
            note="with making the namespaces, as in the row of the detector without a root prefix",
        )
    )
    return Curve(key=f"last-{key}", what=title, over="scripts", unit="ms", points=points)


def _idle(chapter: Chapter, key: str, title: str, pid: int, *, peer: bool) -> None:
    time.sleep(2)
    before = wake_ups(pid)
    time.sleep(10)
    woken = (wake_ups(pid) - before) * 6.0
    found = memory_mib(pid)
    for what, unit, value in (("RSS", "MiB", found["Rss"]), ("PSS", "MiB", found["Pss"]), ("wake-ups", "/min", woken)):
        chapter.series.append(
            Series(key=f"{what}-{key}", what=f"{title}: idle {what}", unit=unit, values=[value], peer=peer)
        )
