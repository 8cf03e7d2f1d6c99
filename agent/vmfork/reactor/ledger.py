# SPDX-License-Identifier: Apache-2.0
"""Remembers in RAM which hooks run now, so that a reactor that was killed leaves none running beside the next one's.

One line of JSON is appended when a hook begins, when its process is known, and when it ended. The next reactor, which
holds the lock by then, kills what the last one had not seen the end of. A broken line is ignored: the file is only
ever written by root, and its last line may be cut short. A full /run must not keep the hooks from running: what cannot
be remembered is said once, and the reaction goes on without it.
"""

from __future__ import annotations

import json
import logging
import os
from dataclasses import dataclass, replace
from types import TracebackType

from vmfork.annotations import Self
from vmfork.errors import InputError
from vmfork.jsonfields import JsonObject, parse_object
from vmfork.paths import Paths
from vmfork.reactor import descendants
from vmfork.reactor.descendants import Mark, Process

log = logging.getLogger(__name__)

_MAX_BYTES = 1 << 22
_KILL_SEC = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Entry:
    """A hook that was begun, and its process once there is one."""

    hook: str
    token: str | None = None
    pid: int = 0
    start: int = 0


class Ledger:
    """The file react.hooks, mode 0600; opening it kills the leftovers that it names. A context manager."""

    def __init__(self, paths: Paths) -> None:
        path = self._path = paths.react_hooks
        self._descriptor = -1
        self._refused = False
        try:
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            data = os.pread(self._descriptor, _MAX_BYTES, 0)
        except OSError as error:
            self._complain(error)
            return
        unfinished = _unfinished(data, path)
        left = (
            descendants.kill_until_gone(lambda: _leftovers(unfinished, paths.root), seconds=_KILL_SEC)
            if unfinished
            else []
        )
        if left:
            log.error("processes of an earlier reaction cannot be killed: %s", ", ".join(str(one.pid) for one in left))
        try:
            os.ftruncate(self._descriptor, 0)
        except OSError as error:
            self._complain(error)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)

    def begins(self, hook: str, token: str | None) -> None:
        """Before the hook is started: its environment is enough to find it."""
        self._append({"hook": hook, "token": token})

    def runs(self, hook: str, token: str | None, process: Process) -> None:
        """The hook's first process; a hook that was forked without exec is found by nothing else."""
        self._append({"hook": hook, "token": token, "pid": process.pid, "start": process.start})

    def ended(self, hook: str) -> None:
        """Nothing of the hook is to be killed any more."""
        self._append({"hook": hook, "ended": True})

    def _append(self, fields: JsonObject) -> None:
        if self._descriptor < 0:
            return
        # After a line that was refused, a part of it may stand there.
        line = (b"\n" if self._refused else b"") + json.dumps(fields).encode() + b"\n"
        try:
            self._refused = os.write(self._descriptor, line) < len(line) or self._refused
        except OSError as error:
            self._complain(error)

    def _complain(self, error: OSError) -> None:
        if not self._refused:
            log.warning("%s: %s; hooks run without being remembered there", self._path, error.strerror)
        self._refused = True


def _unfinished(data: bytes, place: str) -> list[_Entry]:
    entries: dict[str, _Entry] = {}
    for line in data.splitlines():
        try:
            fields = parse_object(line, place)
            name = fields.text("hook")
            if fields.flag("ended"):
                entries.pop(name, None)
                continue
            entry = entries.get(name) or _Entry(hook=name, token=fields.text_or_none("token"))
            pid, start = fields.integer_or_none("pid"), fields.integer_or_none("start")
            entries[name] = entry if pid is None else replace(entry, pid=pid, start=start or 0)
        except InputError as error:
            log.debug("%s", error)
    return list(entries.values())


def _leftovers(entries: list[_Entry], root: str) -> list[Process]:
    table = descendants.processes()
    spared = _ancestors(table)
    found: dict[int, Process] = {}
    for entry in entries:
        leader = table.get(entry.pid)
        # Another process with this id: the id was reused, so it says nothing about a session either.
        pid = -1 if leader is not None and leader.start != entry.start else entry.pid or -1
        mark = Mark(pid=pid, name=entry.hook, token=entry.token, root=root)
        carriers = [process for process in table.values() if descendants.carries(process.pid, mark)]
        roots = [process for process in carriers if process.pid not in spared]
        found.update({one.pid: one for one in descendants.members(mark, table, roots, alone=True)})
    return [process for process in found.values() if process.pid not in spared]


def _ancestors(table: dict[int, Process]) -> set[int]:
    """This process and those above it: a hook may have restarted the daemon that started us."""
    line, pid = set(), os.getpid()
    while pid in table and pid not in line:
        line.add(pid)
        pid = table[pid].parent
    return line
