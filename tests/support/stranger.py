# SPDX-License-Identifier: Apache-2.0
"""Programs of somebody else: another user of the guest, or root of a container that sees /run/vmfork and no more.

They run a copy of the package with the system's own Python, since the checkout may be out of their reach.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from support.fakeguest import FakeGuest
from support.runningdaemon import AGENT, PATIENCE_SEC
from support.tools import need

NOBODY = 65534

# The container's root: the system's programs, the package, and what is published.
_CONTAINER = r"""
set -eu
box=$1 published=$2 package=$3
shift 3
mount -t tmpfs -o mode=0755 tmpfs "$box"
mkdir -p "$box/run/vmfork" "$box/usr" "$box/opt" "$box/proc" "$box/dev" "$box/tmp"
for link in bin lib lib64 sbin; do
    if [ -L "/$link" ]; then ln -s "usr/$link" "$box/$link"
    elif [ -d "/$link" ]; then mkdir "$box/$link"; mount --rbind "/$link" "$box/$link"; fi
done
mount --rbind /usr "$box/usr"
mount --bind "$package" "$box/opt"
mount --bind "$published" "$box/run/vmfork"
mount -o remount,bind,ro "$box/run/vmfork"
mount -t proc proc "$box/proc"
touch "$box/dev/null" "$box/dev/urandom"
mount --bind /dev/null "$box/dev/null"
mount --bind /dev/urandom "$box/dev/urandom"
exec chroot "$box" /usr/bin/env -i PATH=/usr/bin:/bin PYTHONPATH=/opt "$@"
"""


@contextmanager
def public_directory() -> Iterator[Path]:
    """A directory that everybody may enter and only its owner may change; pytest's own are shut."""
    with tempfile.TemporaryDirectory(prefix="vmfork-") as name:
        path = Path(name)
        path.chmod(0o755)
        shutil.copytree(AGENT / "vmfork", path / "package/vmfork", ignore=shutil.ignore_patterns("__pycache__"))
        yield path


def _interpreter() -> str:
    return str(Path(sys.executable).resolve())


class Stranger:
    """Another uid, without any group or capability of ours."""

    def __init__(self, guest: FakeGuest) -> None:
        package = guest.root.parent / "package"
        setpriv = need("setpriv", package="util-linux")
        root = f"VMFORK_ROOT={guest.root}"
        self.command = [
            *(setpriv, f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"),
            *("env", "-i", "PATH=/usr/bin:/bin", f"PYTHONPATH={package}", root, _interpreter(), "-P"),
        ]


class ContainerRoot:
    """uid 0 in mount and PID namespaces of its own; what the guest publishes is mounted read-only."""

    def __init__(self, guest: FakeGuest) -> None:
        unshare = need("unshare", package="util-linux")
        box = guest.root.parent / "box"
        box.mkdir()
        self.command = [
            *(unshare, "--mount", "--pid", "--fork", "--propagation", "private", "sh", "-c", _CONTAINER, "sh"),
            *(str(box), guest.paths.run_public, str(guest.root.parent / "package"), _interpreter(), "-P"),
        ]


def start(command: Sequence[str], program: str) -> subprocess.Popen[str]:
    """Run a Python program there, to talk with line by line."""
    return subprocess.Popen(
        [*command, "-u", "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(command: Sequence[str], program: str) -> Any:
    """Run a Python program there to its end; the value that it printed as JSON."""
    done = subprocess.run(
        [*command, "-c", program], capture_output=True, text=True, timeout=3 * PATIENCE_SEC, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
