# SPDX-License-Identifier: Apache-2.0
"""What hooks left behind: children of this reactor, which is their subreaper, that are no hooks themselves.

Whatever was there when a group of hooks began is none of theirs, and stays so.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping

from vmfork import ids
from vmfork.reactor import descendants
from vmfork.reactor.descendants import Mark, Process

log = logging.getLogger(__name__)

_NAMES = 8  # in one message


class Orphans:
    """`hooks()` are the ids of the processes of the hooks that run now."""

    def __init__(self, hooks: Callable[[], set[int]]) -> None:
        self._hooks = hooks
        self._strangers: set[tuple[int, int]] = set()
        self._alone = False

    def begin(self, *, alone: bool) -> None:
        """A group of hooks begins, or a single one, to which every orphan then belongs that names no other hook."""
        self._alone = alone
        self._strangers |= {(one.pid, one.start) for one in self._all()}

    def family(self, mark: Mark) -> list[Process]:
        """Every process of one hook."""
        table = descendants.processes()
        return descendants.members(mark, table, self._all(table), alone=self._alone)

    def report(self, marks: Mapping[str, Mark], *, generation: int) -> None:
        """The group has ended: collect what ended with it, and say what still runs and which hook left it."""
        descendants.reap({pid for pid, _ in self._strangers})
        for process in self._all():
            owner = next((name for name, mark in marks.items() if descendants.carries(process.pid, mark)), None)
            name = owner if owner is not None else " or ".join(list(marks)[:_NAMES])
            fields = {"MESSAGE_ID": ids.HOOK_LEFT_PROCESSES, "VMFORK_GENERATION": generation, "VMFORK_HOOK": name}
            log.info("%s: left process %d running", name, process.pid, extra=fields)

    def _all(self, table: Mapping[int, Process] | None = None) -> list[Process]:
        if not descendants.has_children():
            return []
        hooks = self._hooks()
        return [
            process
            for process in (table if table is not None else descendants.processes()).values()
            if process.parent == os.getpid()
            and process.pid not in hooks
            and (process.pid, process.start) not in self._strangers
        ]
