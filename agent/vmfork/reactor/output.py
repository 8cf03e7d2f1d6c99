# SPDX-License-Identifier: Apache-2.0
"""What hooks print, line by line to the log, in bounded memory however much they print.

Each hook has a budget of lines and bytes. Beyond it output is read and thrown away, so that the hook never blocks on
its pipe; at the end the log says how much was dropped and shows the last of it, since an error stands there.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable

from vmfork import ids

log = logging.getLogger(__name__)

MAX_LINE = 4096
MAX_LINES = 1000
MAX_BYTES = 256 * 1024
_TAIL = 1024
_CHUNK = 1 << 16


class Output:
    """The reading end of one hook's stdout and stderr. `sink` gets each line, free of control characters."""

    def __init__(self, descriptor: int, sink: Callable[[str], None]) -> None:
        os.set_blocking(descriptor, False)
        self.descriptor: int | None = descriptor
        self.dropped = 0
        self._sink = sink
        self._partial = b""
        self._tail = b""
        self._lines = 0
        self._bytes = 0

    def read(self) -> bool:
        """Take what is there, one chunk at most; False once every writer has closed the pipe."""
        if self.descriptor is None:
            return False
        try:
            chunk = os.read(self.descriptor, _CHUNK)
        except BlockingIOError:
            return True
        if chunk:
            self._take(chunk)
        return bool(chunk)

    def close(self) -> None:
        """Show what is left and let go of the pipe; harmless when done twice."""
        if self.descriptor is None:
            return
        os.close(self.descriptor)
        self.descriptor = None
        if self._partial:
            self._emit(self._partial)
            self._partial = b""
        if self.dropped:
            self._sink(f"({self.dropped} more bytes of output were dropped; it ends with:)")
            for line in self._tail.split(b"\n")[-4:]:
                if line:
                    self._sink(_shown(line))

    def _take(self, chunk: bytes) -> None:
        if self._exhausted():
            self._drop(chunk)
            return
        *lines, self._partial = (self._partial + chunk).split(b"\n")
        for number, line in enumerate(lines):
            if self._exhausted():
                self._drop(b"\n".join([*lines[number:], self._partial]))
                self._partial = b""
                return
            self._emit(line)
        while len(self._partial) > MAX_LINE and not self._exhausted():
            self._emit(self._partial[:MAX_LINE])
            self._partial = self._partial[MAX_LINE:]

    def _exhausted(self) -> bool:
        return self._lines >= MAX_LINES or self._bytes >= MAX_BYTES

    def _emit(self, line: bytes) -> None:
        for start in range(0, max(len(line), 1), MAX_LINE):
            piece = line[start : start + MAX_LINE]
            self._lines += 1
            self._bytes += len(piece)
            self._sink(_shown(piece))

    def _drop(self, data: bytes) -> None:
        self.dropped += len(data)
        self._tail = (self._tail + data[-_TAIL:])[-_TAIL:]


def line_logger(hook: str, generation: int) -> Callable[[str], None]:
    """A sink that logs each line with the hook's name and the generation as fields."""
    fields = {"MESSAGE_ID": ids.HOOK_OUTPUT, "VMFORK_HOOK": hook, "VMFORK_GENERATION": generation}

    def sink(line: str) -> None:
        log.info("%s: %s", hook, line, extra=fields)

    return sink


def warn_dropped(hook: str, generation: int, dropped: int) -> None:
    """One message that a hook printed more than is kept."""
    fields = {"MESSAGE_ID": ids.HOOK_OUTPUT_DROPPED, "VMFORK_HOOK": hook, "VMFORK_GENERATION": generation}
    log.warning("%s: printed too much, %d bytes were dropped", hook, dropped, extra=fields)


def _shown(line: bytes) -> str:
    text = line.decode("utf-8", "backslashreplace").rstrip("\r")
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() or char == "\t" else char.encode("unicode_escape").decode() for char in text
    )
