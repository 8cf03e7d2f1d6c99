# SPDX-License-Identifier: Apache-2.0
"""Debian packages unpacked beside the system and laid over it in a mount namespace: programs that cannot be installed
here (postfix and exim4 exclude each other, servers would start at the next boot) still run for real.

Their maintainer scripts are not run, so the users that a server needs are named by the test. All processes in there end
with the object. Needs root, and packages from the machine's own apt sources.
"""

from __future__ import annotations

import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from support.tools import need_root, unavailable

_FIRST_ID = 64800


def unpack(place: Path, *packages: str) -> Path:
    """A tree with these packages and with those that they need and that this machine lacks."""
    need_root()
    if shutil.which("apt-get") is None:
        unavailable("this is not a Debian machine")
    archives, tree = place / "archives", place / "tree"
    (archives / "partial").mkdir(parents=True)
    tree.mkdir()
    options = ["-y", "-qq", "--no-install-recommends", "-o", "Debug::NoLocking=1", "-o", "APT::Sandbox::User=root"]
    got = subprocess.run(
        ["apt-get", *options, "-o", f"Dir::Cache::archives={archives}", "--download-only", "install", *packages],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    if got.returncode != 0:
        unavailable(f"apt-get cannot download {', '.join(packages)}: {got.stderr.strip()[-300:]}")
    for archive in archives.glob("*.deb"):
        subprocess.run(["dpkg-deb", "-x", archive, tree], check=True)
        archive.unlink()
    return tree


class Unpacked:
    """Programs of unpacked packages, in a mount and a process namespace.

    They have this machine's network, or that of the network namespace `network`. `more` are lines of a shell script
    that are run there first. Files below `etc` are laid over those of the packages.
    """

    def __init__(
        self, tree: Path, scratch: Path, users: Sequence[str], *, network: str | None = None, more: Sequence[str] = ()
    ) -> None:
        self.etc = scratch / "etc"
        self.etc.mkdir(parents=True)
        self._enter = ("nsenter", f"--net=/run/netns/{network}") if network else ()
        self._more = more
        self._tree = tree
        for name, form in (("passwd", "{}:x:{}:{}::/nonexistent:/usr/sbin/nologin"), ("group", "{}:x:{}:")):
            lines = [
                line for line in Path("/etc", name).read_text().splitlines() if line.partition(":")[0] not in users
            ]
            lines += [form.format(user, number, number) for number, user in enumerate(users, _FIRST_ID)]
            (self.etc / name).write_text("\n".join(lines) + "\n")
        self._holder: subprocess.Popen[bytes] | None = None
        self._first = 0
        self._children: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Unpacked:
        layers: dict[str, list[Path]] = {
            "/usr": [self._tree / "usr", Path("/usr")],
            "/etc": [self.etc, self._tree / "etc", Path("/etc")],
        }
        script = ["set -eu"]
        for target, below in layers.items():
            lower = ":".join(str(path) for path in below if path.is_dir())
            script.append(f"mount -t overlay overlay -o {shlex.quote(f'lowerdir={lower}')} {target}")
        # The first process adopts and reaps what daemonizes, and its end is the end of all.
        script += ["mount -t proc proc /proc", *self._more, "echo ready", "sleep infinity & wait"]
        command = [
            *self._enter,
            "unshare",
            "--mount",
            "--pid",
            "--fork",
            "--kill-child",
            "--propagation",
            "private",
            "--",
        ]
        self._holder = subprocess.Popen([*command, "sh", "-c", "\n".join(script)], stdout=subprocess.PIPE)
        assert self._holder.stdout is not None
        if self._holder.stdout.readline() != b"ready\n":
            self.close()
            unavailable("cannot lay packages over the system here (unshare, overlay)")
        inner = Path(f"/proc/{self._holder.pid}/task/{self._holder.pid}/children").read_text().split()
        self._first = int(inner[0])
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End every process in there."""
        if self._holder is not None:
            self._holder.kill()
            self._holder.communicate()
        for child in self._children:
            child.wait(10)

    def command(self, *argv: str) -> list[str]:
        """A command line that runs `argv` in there."""
        return ["nsenter", f"--target={self._first}", "--mount", "--pid", "--net", "--", *argv]

    def start(self, *argv: str) -> None:
        """Start a program that ends with this object."""
        quiet = subprocess.DEVNULL
        self._children.append(subprocess.Popen(self.command(*argv), stdin=quiet, stdout=quiet, stderr=quiet))

    def run(self, *argv: str, check: bool = True, timeout: float = 60) -> subprocess.CompletedProcess[str]:
        """Run a program in there; with `check`, its failure is an AssertionError."""
        done = subprocess.run(
            self.command(*argv),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        if check:
            assert done.returncode == 0, f"{shlex.join(argv)}: {done.stdout}{done.stderr}"
        return done
