# SPDX-License-Identifier: Apache-2.0
"""What the lab needs of the host: tools, root, room. Says what is missing and how to get it, all of it at once.

The list of Debian packages is `tests/vm/packages.txt`; this module installs nothing.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

PACKAGES = Path(__file__).parent.parent / "packages.txt"

_TOOLS = {
    "qemu-system-x86_64": "qemu-system-x86",
    "qemu-system-aarch64": "qemu-system-arm",
    "qemu-img": "qemu-utils",
    "mmdebstrap": "mmdebstrap",
    "apt-ftparchive": "apt-utils",
    "dtc": "device-tree-compiler",
    "mke2fs": "e2fsprogs",
    "setpriv": "util-linux",
    "xz": "xz-utils",
}


class LabError(Exception):
    """The lab itself failed: an image could not be built, a guest did not boot, an answer never came."""


class LabUnavailable(LabError):
    """This host cannot run the lab; the message says what is missing and how to get it."""


def packages() -> list[str]:
    """The Debian packages that the lab needs on the host."""
    lines = (line.partition("#")[0].strip() for line in PACKAGES.read_text().splitlines())
    return [line for line in lines if line]


def tool(name: str) -> str:
    """The path of an installed tool, also from the sbin directories that a user's PATH may lack."""
    found = shutil.which(name) or shutil.which(name, path="/usr/local/sbin:/usr/sbin:/sbin")
    if found is None:
        raise LabUnavailable(f"{name} is not installed: apt-get install {_TOOLS.get(name, name)}")
    return found


def missing() -> str | None:
    """Everything that keeps the lab from running here, in one sentence, or None."""
    problems = []
    absent = []
    for name, package in _TOOLS.items():
        try:
            tool(name)
        except LabUnavailable:
            absent.append(package)
    if absent:
        problems.append(f"missing tools: apt-get install {' '.join(sorted(set(absent)))}")
    if os.geteuid() != 0:
        problems.append("building guest images needs root")
    return "; ".join(problems) or None
