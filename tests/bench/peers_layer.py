# SPDX-License-Identifier: Apache-2.0
"""The other programs, installed into a layer over this machine that lies below build/, and what is common to them.

The layer is made anew when the list of packages is another one. The machine itself stays as it is.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bench.place import TOP

PACKAGES = ("udev", "acpid", "qemu-guest-agent", "networkd-dispatcher", "network-manager")
_LAYER = TOP / "build/bench-peers"
_STAMP = _LAYER / "packages"


def install() -> str | None:
    """Put the peers into a layer over this machine; why that cannot be, None where it is done."""
    wanted = "\n".join(PACKAGES) + "\n"
    if _STAMP.exists() and _STAMP.read_text() == wanted:
        return None
    if shutil.which("apt-get") is None:
        return "needs apt-get"
    _STAMP.unlink(missing_ok=True)
    for name in ("upper", "work"):
        if (_LAYER / name).exists():
            shutil.rmtree(_LAYER / name)
    for name in ("upper", "work", "root"):
        (_LAYER / name).mkdir(parents=True, exist_ok=True)
    root = shlex.quote(str(_LAYER / "root"))
    script = f"""set -e
mount -t overlay o -o lowerdir=/,upperdir={_LAYER}/upper,workdir={_LAYER}/work {root}
mount -t proc proc {root}/proc; mount -t tmpfs t {root}/run; mount -t tmpfs t {root}/sys; mount --bind /dev {root}/dev
printf '#!/bin/sh\\nexit 101\\n' > {root}/usr/sbin/policy-rc.d; chmod 755 {root}/usr/sbin/policy-rc.d
chroot {root} apt-get install -y -qq --no-install-recommends -o APT::Sandbox::User=root {" ".join(PACKAGES)}
exec chroot {root} apt-get clean"""
    command = ["unshare", "--mount", "--propagation", "private", "sh", "-c", script]
    more = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    try:
        done = subprocess.run(command, env=more, capture_output=True, text=True, check=False, timeout=600)
    except subprocess.TimeoutExpired:
        return "apt-get took too long"
    if done.returncode != 0:
        return f"apt-get cannot install {', '.join(PACKAGES)} here"
    _STAMP.write_text(wanted)
    return None


def layer(directory: Path) -> str:
    """The lower directories of a copy with the peers: a layer must not lie in another one's file system."""
    copy = directory / "layer"
    subprocess.run(["cp", "-a", str(_LAYER / "upper"), str(copy)], check=True)
    return f"{copy}:/"


@dataclass(slots=True, kw_only=True)
class Running:
    """A peer that is up: `fire` makes one event and returns its moment, `started_ms` is how long the start took.

    `rest` waits until it has done all that the event asked of it.
    """

    pid: int
    fire: Callable[[], int]
    scripts: list[Path]
    started_ms: float
    rest: Callable[[], None] = lambda: None


def put_scripts(directory: Path, program: Path, count: int) -> list[Path]:
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


def inside(path: Path) -> str:
    """The path of such a script as the peer sees it."""
    return f"/run/scripts/{path.name}"
