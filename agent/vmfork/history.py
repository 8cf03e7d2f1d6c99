# SPDX-License-Identifier: Apache-2.0
"""/var/lib/vmfork/history.jsonl: one line for each fork whose reaction ended, the newest 1000.

Lines are appended, so that starting never costs more for a long history. Now and then the oldest are cut off. A line
that cannot be understood, torn by a power cut or written by a newer version, is passed over and counted. Readers begin
at the end and hold one block: what somebody asks of it must not make the daemon grow.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass

from vmfork import atomicfile
from vmfork.errors import InputError, UnreadableError
from vmfork.jsonfields import parse_object
from vmfork.model import ForkEvent
from vmfork.paths import Paths

KEPT = 1000
# Cutting costs a rewrite of the file: do it once in so many forks.
SLACK = 200
_MAX_BYTES = 64 << 20
_BLOCK = 64 << 10
_LONGEST_LINE = 4 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class History:
    """The forks, oldest first, and how many lines could not be understood."""

    events: tuple[ForkEvent, ...] = ()
    unreadable_lines: int = 0


def newest_first(paths: Paths) -> Iterator[ForkEvent | None]:
    """The forks, the newest first, read from the end of the file as they are asked for; None for an unreadable line.

    A fork that stands there twice (its reaction was repeated) comes once, in its last form. Raises InputError where
    the file cannot be read, its UnreadableError where the kernel refuses; no file is an empty history.
    """
    seen: set[bytes] = set()
    for line in _lines_from_the_end(paths.history):
        try:
            event = ForkEvent.from_json(parse_object(line, paths.history))
        except InputError:
            yield None
            continue
        if event.token not in seen:
            seen.add(event.token)
            yield event


def load(paths: Paths) -> History:
    """The newest forks, as many as are kept; InputError where the file cannot be read, no file is an empty history."""
    events: list[ForkEvent] = []
    unreadable = 0
    for event in newest_first(paths):
        if event is None:
            unreadable += 1
        else:
            events.append(event)
        if len(events) == KEPT:
            break
    return History(events=tuple(reversed(events)), unreadable_lines=unreadable)


def _lines_from_the_end(path: str) -> Iterator[bytes]:
    try:
        # Without O_NONBLOCK a pipe in its place would hold up the daemon.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        return
    except OSError as error:
        raise UnreadableError(path, f"cannot be read: {error.strerror}", hint="run as root") from error
    try:
        position, rest = os.lseek(descriptor, 0, os.SEEK_END), b""
        while position:
            size = min(_BLOCK, position)
            position -= size
            rest, *lines = (os.pread(descriptor, size, position) + rest).split(b"\n")
            if len(rest) > _LONGEST_LINE:
                raise InputError(path, f"has a line of more than {_LONGEST_LINE} bytes")
            yield from filter(None, reversed(lines))
        if rest:
            yield rest
    except OSError as error:
        if error.errno in (errno.EISDIR, errno.ESPIPE):
            raise InputError(path, "is no regular file") from error
        raise UnreadableError(path, f"cannot be read: {error.strerror}") from error
    finally:
        os.close(descriptor)


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
            self._lines = sum(1 for _ in _lines_from_the_end(self._paths.history))
        if self._lines < KEPT + SLACK:
            return
        lines = atomicfile.read_bounded(self._paths.history, _MAX_BYTES).splitlines(keepends=True)[-KEPT:]
        atomicfile.replace(self._paths.history, b"".join(lines), durable=True)
        self._lines = len(lines)
