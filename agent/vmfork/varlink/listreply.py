# SPDX-License-Identifier: Apache-2.0
"""A long reply of one array, written from its end to its beginning, item by item.

For what is read newest first and told newest last. The text lies in memory of its own, which the kernel takes back when
it was sent: a megabyte of small pieces would stay with the allocator for good.
"""

from __future__ import annotations

import contextlib
import mmap

from vmfork.jsonfields import JsonObject
from vmfork.varlink.framing import encode_item

_END = b"]}}\0"


class ListReply:
    """The reply `{name: [items]}`; of `capacity` bytes only those that are written to take memory. OSError where the
    kernel gives none."""

    __slots__ = ("_beginning", "_memory", "_start")

    def __init__(self, name: str, *, capacity: int) -> None:
        self._memory = mmap.mmap(-1, capacity, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        # Where transparent huge pages are "always", the first byte would take 2 MiB, of which the limits on what is
        # buffered know nothing. A kernel that was built without them refuses the advice.
        with contextlib.suppress(OSError):
            self._memory.madvise(mmap.MADV_NOHUGEPAGE)
        self._beginning = b'{"parameters":{"%s":[' % name.encode("ascii")
        self._start = capacity
        self._write(_END)

    def prepend(self, item: JsonObject) -> bool:
        """Put an item before those that are there; False where there is no room for it."""
        text = encode_item(item)
        if len(self._beginning) + len(text) + 1 > self._start:
            return False
        if self._memory[self._start : self._start + 1] != b"]":
            self._write(b",")
        self._write(text)
        return True

    def message(self) -> memoryview:
        """The whole of it; nothing can be put before it then."""
        self._write(self._beginning)
        return memoryview(self._memory)[self._start :]

    def _write(self, text: bytes) -> None:
        self._memory[self._start - len(text) : self._start] = text
        self._start -= len(text)
