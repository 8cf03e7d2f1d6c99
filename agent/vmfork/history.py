# SPDX-License-Identifier: Apache-2.0
"""/var/lib/vmfork/history.jsonl: one line for each fork whose reaction ended, the newest 1000.

Lines are appended, so that starting never costs more for a long history. Now and then the oldest are cut off. A line
that cannot be understood, torn by a power cut or written by a newer version, is passed over and counted.
"""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import dataclass

from vmfork import atomicfile
from vmfork.errors import InputError
from vmfork.jsonfields import parse_object
from vmfork.model import ForkEvent
from vmfork.paths import Paths

KEPT = 1000
# Cutting costs a rewrite of the file: do it once in so many forks.
_SLACK = 200
_MAX_BYTES = 64 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class History:
    """The forks, oldest first, and how many lines could not be understood."""

    events: tuple[ForkEvent, ...] = ()
    unreadable_lines: int = 0


def load(paths: Paths, *, limit: int = KEPT) -> History:
    """The newest `limit` forks. A fork that stands there twice (its reaction was repeated) counts once, the last one.

    Raises InputError where the file cannot be read at all; no file is an empty history.
    """
    try:
        data = atomicfile.read_bounded(paths.history, _MAX_BYTES)
    except FileNotFoundError:
        return History()
    except OSError as error:
        raise InputError(paths.history, f"cannot be read: {error.strerror}", hint="run as root") from error
    found: dict[bytes, ForkEvent] = {}
    unreadable = 0
    for line in data.splitlines():
        try:
            event = ForkEvent.from_json(parse_object(line, paths.history))
        except InputError:
            unreadable += 1
            continue
        found.pop(event.token, None)
        found[event.token] = event
    return History(events=tuple(found.values())[-limit:] if limit > 0 else (), unreadable_lines=unreadable)


class HistoryWriter:
    """Appends for the daemon; it alone writes."""

    def __init__(self, paths: Paths) -> None:
        self._paths = paths
        self._lines = -1

    def append(self, event: ForkEvent) -> None:
        """Add one fork; OSError if the disk refuses, InputError if the file is too large to be cut."""
        self._cut()
        line = json.dumps(event.to_json(with_ids=True), separators=(",", ":")).encode() + b"\n"
        descriptor = os.open(
            self._paths.history, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600
        )
        try:
            end = os.lseek(descriptor, 0, os.SEEK_END)
            if end and os.pread(descriptor, 1, end - 1) != b"\n":
                line = b"\n" + line  # a torn line must not swallow this one
            # A disk that fills up takes a part: the rest is refused then, and what was taken is a torn line.
            atomicfile.write_all(descriptor, line)
            os.fdatasync(descriptor)
        finally:
            os.close(descriptor)
        self._lines += 1

    def _cut(self) -> None:
        # Before the new line: where the file cannot be cut, trying again must not make it longer each time.
        if self._lines < 0:
            with contextlib.suppress(FileNotFoundError):
                self._lines = atomicfile.read_bounded(self._paths.history, _MAX_BYTES).count(b"\n")
        if self._lines < KEPT + _SLACK:
            return
        lines = atomicfile.read_bounded(self._paths.history, _MAX_BYTES).splitlines(keepends=True)[-KEPT:]
        atomicfile.replace(self._paths.history, b"".join(lines), durable=True)
        self._lines = len(lines)
