# SPDX-License-Identifier: Apache-2.0
"""Where an old machine ID can still be seen: journal directories, boot loader entries, open files of processes.

Bounded and best effort: only names are looked at, never the content of foreign files, and nothing is changed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

from vmfork.paths import Paths

_MAX_PROCESSES = 32768
_MAX_LINES = 40


def holders(paths: Paths, old: str) -> tuple[str, ...]:
    """One line for each thing that still carries the old ID, at most 40 of them."""
    lines: list[str] = []
    for line in _all(paths, old):
        if len(lines) == _MAX_LINES:
            lines.append("and more")
            break
        lines.append(line)
    return tuple(lines)


def _all(paths: Paths, old: str) -> Iterator[str]:
    for place, why in (
        (paths.journal_run, "journals of this boot; journalctl --merge reads them"),
        (paths.journal_var, "older journals; journalctl --merge reads them"),
    ):
        path = os.path.join(place, old)
        if os.path.isdir(path):
            yield f"{path} ({why})"
    yield from _boot_entries(paths, old)
    yield from _processes(paths, old)
    if os.path.isdir(paths.systemd_runs):
        yield "PID 1, and the message bus (%m in units, bus names), until the next boot"


def _boot_entries(paths: Paths, old: str) -> Iterator[str]:
    for boot in ("/boot", "/efi", "/boot/efi"):
        for directory in (boot, f"{boot}/loader/entries"):
            try:
                names = sorted(os.listdir(paths.at(directory)))
            except OSError:
                continue
            for name in names:
                if name.startswith(old):
                    yield f"{directory}/{name} (boot loader)"


def _processes(paths: Paths, old: str) -> Iterator[str]:
    try:
        pids = [name for name in os.listdir(paths.processes) if name.isdigit()][:_MAX_PROCESSES]
    except OSError:
        return
    for pid in sorted(pids, key=int):
        found = _open_file(os.path.join(paths.processes, pid, "fd"), old)
        if found is not None:
            yield f"process {pid} ({_name(paths, pid)}), which has {found} open"


def _open_file(directory: str, old: str) -> str | None:
    try:
        for name in os.listdir(directory):
            target = os.readlink(os.path.join(directory, name))
            if old in target:
                return target
    except OSError:
        pass
    return None


def _name(paths: Paths, pid: str) -> str:
    try:
        with open(os.path.join(paths.processes, pid, "comm"), encoding="utf-8", errors="replace") as file:
            return file.read(64).strip()
    except OSError:
        return "ended"
