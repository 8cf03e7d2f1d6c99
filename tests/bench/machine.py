# SPDX-License-Identifier: Apache-2.0
"""What was measured on, in words that name no host and no path."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from pathlib import Path

from bench.place import guest_python
from vmfork import __version__


def describe() -> dict[str, str]:
    """The machine, its interpreter, the day, and how busy it was with other things."""
    python = subprocess.run([guest_python(), "-VV"], capture_output=True, text=True, check=True).stdout.strip()
    return {
        "vmfork": __version__,
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "processor": _first("/proc/cpuinfo", "model name") or platform.machine(),
        "processors": str(len(os.sched_getaffinity(0))),
        "memory": f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.1f} GiB",
        "kernel": f"Linux {platform.release().split('-')[0]}, {platform.machine()}, {_virtualisation()}",
        "system": _first("/etc/os-release", "PRETTY_NAME", "=").strip('"') or "unknown",
        "python": python.split(" [")[0].split(" (")[0],
        "load": "{:.2f} {:.2f} {:.2f} before the run".format(*os.getloadavg()),
    }


def _virtualisation() -> str:
    return "virtual machine" if " hypervisor" in Path("/proc/cpuinfo").read_text() else "no hypervisor seen"


def _first(path: str, key: str, separator: str = ":") -> str:
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(separator)[2].strip() for line in lines if line.startswith(key)), "")
