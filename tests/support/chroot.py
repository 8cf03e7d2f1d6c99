# SPDX-License-Identifier: Apache-2.0
"""Another release of Debian to run commands in: a tree that stays as it is, under a layer that the test throws away.

Everything is mounted in a mount namespace of the command's own, so nothing is left mounted however the test ends.
There is no service manager inside, and no network is set up or needed. Needs root.
"""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path

_NODES = ("null", "zero", "full", "random", "urandom", "tty")


class Chroot:
    """`tree` is only read; what changes goes to `scratch` and is there again at the next `run`."""

    def __init__(self, tree: Path, scratch: Path) -> None:
        self.tree = tree
        self.root = scratch / "root"
        self.upper = scratch / "upper"
        self._work = scratch / "work"
        for path in (self.root, self.upper, self._work):
            path.mkdir(parents=True)

    def _mounts(self) -> list[str]:
        root = shlex.quote(str(self.root))
        layers = f"lowerdir={self.tree},upperdir={self.upper},workdir={self._work}"
        return [
            "set -eu",
            f"mount -t overlay overlay -o {shlex.quote(layers)} {root}",
            f"mount -t proc proc {root}/proc",
            *(f"mount -t tmpfs -o mode=0755 tmpfs {root}/{name}" for name in ("dev", "run")),
            f"mkdir -p {root}/run/lock {root}/dev/shm {root}/dev/pts",
            *(f"touch {root}/dev/{node}; mount --bind /dev/{node} {root}/dev/{node}" for node in _NODES),
            f"mount -t devpts -o newinstance,ptmxmode=0666 devpts {root}/dev/pts; ln -s pts/ptmx {root}/dev/ptmx",
            f"ln -s /proc/self/fd {root}/dev/fd",
        ]

    def run(self, script: str, *, check: bool = True, timeout: float = 300) -> str:
        """What a shell script in there prints, both streams; with `check`, a failure is an AssertionError."""
        inside = ["chroot", str(self.root), "env", "-i", "PATH=/usr/sbin:/usr/bin:/sbin:/bin", "LANG=C.UTF-8"]
        inside += ["HOME=/root", "DEBIAN_FRONTEND=noninteractive", "sh", "-ec", script]
        done = subprocess.run(
            self.around(inside),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=timeout,
            check=False,
        )
        if check:
            assert done.returncode == 0, f"{script}\nexit status {done.returncode}\n{done.stdout[-4000:]}"
        return done.stdout

    def around(self, command: list[str]) -> list[str]:
        """The same command of the host, made to run where `root` is mounted."""
        namespace = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--propagation", "private", "--"]
        return [*namespace, "sh", "-c", "\n".join([*self._mounts(), f"exec {shlex.join(command)}"])]

    def files(self) -> frozenset[str]:
        """Every path below the root that the test's own layer has changed or added."""
        return frozenset(self.run("find / -xdev ! -path '/root/*' ! -path '/tmp/*'").splitlines())
