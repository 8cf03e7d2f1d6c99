# SPDX-License-Identifier: Apache-2.0
"""Where measured programs run: below a fake root in /dev/shm, or as root in a copy-on-write copy of this machine.

The copy has namespaces of its own for mounts, network, host name and IPC, with /run, /sys, /dev and every change in
RAM. vmforkd runs there without any root prefix, with its real paths, ioctls, netlink socket and libraries; only the
kernel's log is a FIFO and sysfs shows what the bench put there. It cannot step the machine's clock.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path

from support.fakeguest import FakeGuest
from vmfork import page
from vmfork.errors import VmforkError

TOP = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
AGENT = TOP / "agent"
FAST = Path("/dev/shm")  # a path in RAM, as /run is


@cache
def guest_python() -> str:
    """The interpreter that a guest would use: the distribution's, where it has the libraries of the daemon."""
    system = "/usr/bin/python3"
    probe = [system, "-I", "-c", "import sys, pyudev, systemd.journal; assert sys.version_info >= (3, 11)"]
    with contextlib.suppress(OSError):
        if subprocess.run(probe, capture_output=True, check=False).returncode == 0:
            return system
    return sys.executable


def environment(**more: str) -> dict[str, str]:
    return {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8", "PYTHONPATH": str(AGENT), **more}


def scratch() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="vmfork-bench-", dir=FAST if FAST.is_dir() else None)


def build(source: str, target: Path, *flags: str) -> Path:
    """Compile one of the bench's own C programs."""
    command = ["cc", "-O2", "-std=gnu11", "-Wall", "-Wextra", "-Werror", *flags]
    subprocess.run([*command, "-o", str(target), str(HERE / source)], check=True)
    return target


def pinned(cpu: int, command: Sequence[str]) -> list[str]:
    """The command on one CPU, where the machine has several."""
    cpus = sorted(os.sched_getaffinity(0))
    return ["taskset", "-c", str(cpus[cpu % len(cpus)]), *command] if len(cpus) > 1 else list(command)


@contextlib.contextmanager
def on_cpu(number: int) -> Iterator[None]:
    """This process on one CPU, for as long as it watches."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {sorted(before)[number % len(before)]})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def until(condition: Callable[[], object], what: str, *, seconds: float = 60.0, pause: float = 0.002) -> None:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"not in time: {what}")
        time.sleep(pause)


@contextlib.contextmanager
def running(command: Sequence[str], **options: object) -> Iterator[subprocess.Popen[bytes]]:
    """A child that ends with the block."""
    child: subprocess.Popen[bytes] = subprocess.Popen(list(command), **options)  # type: ignore[call-overload]
    try:
        yield child
    finally:
        child.terminate()
        try:
            child.wait(10)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


class Daemon:
    """A vmforkd that is up; `guest` is where its sources are, whichever way it sees them."""

    def __init__(self, guest: FakeGuest, process: subprocess.Popen[bytes], page_path: str) -> None:
        self.guest = guest
        self.process = process
        self.page_path = page_path

    @property
    def pid(self) -> int:
        return self.process.pid

    def content(self) -> page.PageContent:
        return page.read_page(self.page_path)

    def settled(self, generation: int) -> None:
        """Wait until this generation was reacted to."""

        def is_settled() -> bool:
            found = self.content()
            return found.generation >= generation and found.state != page.STATE_REACTING

        until(is_settled, f"generation {generation} settled")

    def fork(self) -> None:
        """One fork of the guest, awaited to its end."""
        generation = self.content().generation + 1
        self.guest.fork(os.urandom(16))
        self.settled(generation)


def _up(path: str) -> bool:
    try:
        return page.read_page(path).detection != page.DETECTION_NONE
    except VmforkError:  # not there yet, or half made
        return False


@contextlib.contextmanager
def fake_daemon(*, cpu: int | None = None, prepare: Callable[[FakeGuest], None] | None = None) -> Iterator[Daemon]:
    """vmforkd below a fake root in RAM; without root, too."""
    with scratch() as directory, FakeGuest(Path(directory) / "guest") as guest:
        if prepare is not None:
            prepare(guest)
        command = [guest_python(), "-m", "vmfork.daemon", "--root", str(guest.root)]
        command = command if cpu is None else pinned(cpu, command)
        with running(command, env=environment(), stderr=subprocess.DEVNULL) as child:
            path = guest.paths.generation_page
            until(lambda: _up(path), "vmforkd is up")
            yield Daemon(guest, child, path)


_NODES = ("null", "zero", "full", "random", "urandom", "tty")


def can_copy() -> str | None:
    """Why there can be no copy of this machine here, None where there can."""
    if os.geteuid() != 0:
        return "needs root"
    missing = [tool for tool in ("unshare", "setpriv", "chroot", "mount") if shutil.which(tool) is None]
    if missing:
        return f"needs {', '.join(missing)}"
    layers = "lowerdir=/,upperdir=/mnt/u,workdir=/mnt/w"
    probe = f"mount -t tmpfs t /mnt && mkdir /mnt/u /mnt/w /mnt/m && mount -t overlay o -o {layers} /mnt/m"
    done = subprocess.run(["unshare", "-m", "-n", "sh", "-c", probe], capture_output=True, check=False)
    return None if done.returncode == 0 else "needs an overlay file system"


def copy_script(directory: Path, command: Sequence[str], *, lower: str = "/", network: bool = False) -> list[str]:
    """The command line that runs `command` in a copy of this machine; `directory` holds its changes and its sources."""
    root = directory / "root"
    for name in ("upper", "work", "root", "guest/sys", "guest/dev", "guest/run", "guest/var/lib/vmfork"):
        (directory / name).mkdir(parents=True, exist_ok=True)
    layers = f"lowerdir={lower},upperdir={directory / 'upper'},workdir={directory / 'work'}"
    at = shlex.quote(str(root))
    guest = shlex.quote(str(directory / "guest"))
    lines = [
        "set -eu",
        f"mount -t overlay overlay -o {shlex.quote(layers)} {at}",
        f"mount -t proc proc {at}/proc",
        f"mount --bind {guest}/sys {at}/sys",
        f"mount --bind {guest}/run {at}/run",
        f"mkdir -p {at}/var/lib/vmfork; mount --bind {guest}/var/lib/vmfork {at}/var/lib/vmfork",
        f"mount --bind {guest}/dev {at}/dev",
        f"mkdir -p {at}/dev/shm {at}/dev/pts {at}/run/lock",
        *(f"touch {at}/dev/{node}; mount --bind /dev/{node} {at}/dev/{node}" for node in _NODES),
        f"ln -sfn /proc/self/fd {at}/dev/fd",
        f"mkdir -p {at}/opt/vmfork && mount --bind {shlex.quote(str(TOP))} {at}/opt/vmfork",
        "ip link set lo up" if not network else ":",
        f"exec setpriv --bounding-set=-sys_time chroot {at} env -i {shlex.join(inside_environment())} "
        + shlex.join(command),
    ]
    spaces = ["--mount", "--uts", "--ipc", *([] if network else ["--net"])]
    return ["unshare", *spaces, "--propagation", "private", "--", "sh", "-c", "\n".join(lines)]


def inside_environment() -> list[str]:
    return [
        "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "LANG=C.UTF-8",
        "PYTHONPATH=/opt/vmfork/agent",
    ]


def ship_hooks(target: Path) -> None:
    """The shipped hooks, where the package would have them."""
    target.mkdir(parents=True, exist_ok=True)
    for hook in sorted((TOP / "hooks.d").glob("[0-9]*")):
        shutil.copy(hook, target / hook.name)
        (target / hook.name).chmod(0o755)


@contextlib.contextmanager
def real_daemon(
    *,
    cpu: int | None = None,
    hooks: bool = False,
    notify: Path | None = None,
    more: Callable[[Path], None] | None = None,
) -> Iterator[Daemon]:
    """vmforkd without a root prefix in a copy of this machine, logging to what it takes for the journal.

    `hooks`: with the shipped hooks. `notify`: a datagram socket below the copy's /run. `more` is called with the
    directory of the changes before it starts.
    """
    with scratch() as name:
        directory = Path(name)
        command = [guest_python(), "-m", "vmfork.daemon"]
        line = copy_script(directory, command)
        with FakeGuest(directory / "guest") as guest, open(directory / "journal", "wb") as journal:
            usr = directory / "upper/usr"
            if hooks:
                ship_hooks(usr / "lib/vmfork/hooks.d")
                (usr / "bin").mkdir(parents=True, exist_ok=True)
                program = usr / "bin/vmforkctl"
                program.write_text(f'#!/bin/sh\nexec {guest_python()} -m vmfork "$@"\n')
                program.chmod(0o755)
            if more is not None:
                more(directory)
            status = os.fstat(journal.fileno())
            extra = [f"JOURNAL_STREAM={status.st_dev}:{status.st_ino}"]
            if notify is not None:
                extra.append(f"NOTIFY_SOCKET={notify}")
            line[-1] = line[-1].replace("env -i ", f"env -i {shlex.join(extra)} ", 1)
            with running(line if cpu is None else pinned(cpu, line), stderr=journal) as child:
                path = guest.paths.generation_page
                until(lambda: _up(path), "vmforkd is up")
                yield Daemon(guest, child, path)
