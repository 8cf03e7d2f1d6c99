# SPDX-License-Identifier: Apache-2.0
"""varlinkctl of systemd 257 or later, the reference client: the installed one, else Debian 13's.

Debian 12 has none, so Debian 13's systemd package and its libraries are unpacked (no script of them runs) into the
cache, ${XDG_CACHE_HOME:-~/.cache}/vmfork-lab, and run by their own dynamic loader. Needs mmdebstrap and the network
once; VMFORK_LAB_MIRROR names another Debian mirror.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
from pathlib import Path

from support.tools import need, unavailable

_OLDEST = 257
_SUITE = "trixie"
_PACKAGES = "systemd"


def command() -> list[str]:
    """The start of a command line; without varlinkctl and without a way to get it, the test does not run."""
    installed = shutil.which("varlinkctl")
    if installed is not None and _version([installed]) >= _OLDEST:
        return [installed]
    root = _unpacked()
    libraries = next(root.glob("usr/lib/*-linux-gnu"))
    loader = next(libraries.glob("ld-linux*.so*"))
    path = f"{libraries}:{libraries}/systemd"
    return [os.fspath(loader), "--library-path", path, os.fspath(root / "usr/bin/varlinkctl")]


def _version(start: list[str]) -> int:
    answer = subprocess.run([*start, "--version"], capture_output=True, text=True, check=False).stdout
    found = re.match(r"systemd (\d+)", answer)
    return int(found[1]) if found else 0


def _unpacked() -> Path:
    """Debian 13's root with little more than systemd in it."""
    mirror = os.environ.get("VMFORK_LAB_MIRROR")
    source = [f"deb {mirror} {_SUITE} main"] if mirror else []
    key = hashlib.sha256(f"{_SUITE} {_PACKAGES} {os.uname().machine}".encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vmfork-lab"
    cache.mkdir(parents=True, exist_ok=True)
    finished = cache / f"varlinkctl-{key}"
    with open(cache / "varlinkctl.lock", "w", encoding="ascii") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if finished.is_dir():
            return finished
        tool = need("mmdebstrap", package="mmdebstrap")
        partial = cache / ".partial-varlinkctl"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        options = ["--quiet", "--variant=extract", f"--include={_PACKAGES}"]
        built = subprocess.run(
            [tool, *options, _SUITE, os.fspath(partial), *source], capture_output=True, text=True, check=False
        )
        if built.returncode:
            unavailable(f"varlinkctl cannot be fetched from Debian's archive: {built.stderr[-400:].strip()}")
        partial.rename(finished)
    return finished
