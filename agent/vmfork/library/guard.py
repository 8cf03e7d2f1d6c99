# SPDX-License-Identifier: Apache-2.0
"""Was this virtual machine forked? The cheapest way to ask, for code that asks all the time.

`generation` and `supported` read the page once; a `Guard` remembers what it saw last and costs one load and one
comparison; `unforked` checks after the fact, which is what key material needs. Nothing here talks to the daemon.
"""

from __future__ import annotations

import _thread
import os
import time

from vmfork.errors import Forked, InputError, Unavailable
from vmfork.library.mapped import Mapped, map_page, map_vmclock
from vmfork.library.root import paths
from vmfork.page import DETECTION_NONE, DETECTION_OFFSET, PAGE_SIZE, read_page

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import TracebackType
    from typing import Literal

    Source = Literal["auto", "page", "vmclock"]

_HINT = "is vmforkd installed and running?"
# As long as a page: another thread may meet these words with the index of the page that is just being bound.
_NO_WORDS = memoryview(bytes(PAGE_SIZE)).cast("Q")
_DETECTION_WORD = DETECTION_OFFSET // 8
_NEVER = -1

# One lock for the rare slow path of all guards; a child of os.fork() gets a new one, the old may be held for ever.
_lock = _thread.allocate_lock()


def _new_lock() -> None:
    global _lock
    _lock = _thread.allocate_lock()


os.register_at_fork(after_in_child=_new_lock)


def generation() -> int:
    """How often this guest was forked, plus one, as far as vmforkd noticed.

    Clones of one snapshot reach the same numbers: compare it with an earlier value of the same process, never between
    guests. Raises Unavailable without a readable generation page.
    """
    try:
        return read_page(paths().generation_page).generation
    except InputError as error:
        raise Unavailable(str(error), hint=error.hint) from error


def supported() -> bool:
    """Whether there is a generation page and somebody watches for forks. Never raises."""
    try:
        return read_page(paths().generation_page).detection != DETECTION_NONE
    except (InputError, Unavailable):
        return False


class Guard:
    """Tells once per fork that this guest was forked since the guard was made or last said so.

    `source` is bound at creation. "vmclock" is the hypervisor's own counter: it has the new value before the guest
    runs again, though the kernel's RNG may still be shared for a moment. "page" is vmforkd's generation page: it
    changes when vmforkd has noticed, after the kernel's RNG was made different. "auto" takes vmclock where it can be
    read and counts forks, else the page. A page that does not exist yet is opened when it appears, and a fork between
    the guard's creation and that moment is reported then.

    With `strict`, `forked` raises Unavailable when nobody would notice a fork (no page, or no daemon behind it);
    otherwise it is then simply False. Threads may share a guard: one of them is told. After os.fork(), parent and
    child each are told. Raises Unavailable at creation only for "vmclock" where there is none.
    """

    __slots__ = ("_index", "_lax", "_made_at_ns", "_mapped", "_page_path", "_seen", "_value", "_words")

    def __init__(self, source: Source = "auto", *, strict: bool = False) -> None:
        if source not in ("auto", "page", "vmclock"):
            raise ValueError(f"a guard's source is auto, page or vmclock, not {source!r}")
        where = paths()
        self._page_path = where.generation_page
        self._words = _NO_WORDS
        self._index = 0
        self._seen = _NEVER
        self._value = _NEVER
        self._lax = not strict
        self._made_at_ns = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
        found = None if source == "page" else map_vmclock(where.devices)
        if found is None and source == "vmclock":
            raise Unavailable(
                "no vmclock that may be read and counts forks",
                hint="needs Linux 7.0, a hypervisor with vmclock, and vmfork's udev rule",
            )
        self._mapped = found or map_page(self._page_path)
        if self._mapped is not None:
            self._bind(self._mapped, self._mapped.value())

    @property
    def source(self) -> Literal["page", "vmclock"]:
        """What this guard is bound to."""
        return "vmclock" if self._mapped is not None and not self._mapped.is_page else "page"

    def forked(self) -> bool:
        """True once for each fork (several since the last call count as one). See the class for `strict`."""
        if self._words[self._index] == self._seen and (self._lax or self._words[_DETECTION_WORD]):
            return False
        return self._look()

    def _bind(self, mapped: Mapped, value: int) -> None:
        self._mapped, self._words, self._index, self._value = mapped, mapped.words, mapped.index, value
        # Below a root prefix a vmclock is a file that changes by rename: there the path is looked at each time.
        self._seen = value if mapped.is_page or mapped.is_device else _NEVER
        self._lax = self._lax or not mapped.is_page

    def _look(self) -> bool:
        with _lock:
            mapped = self._mapped
            if mapped is None:
                return self._look_for_page()
            if not mapped.is_page and not mapped.is_device and not mapped.is_current():
                mapped = map_vmclock(os.path.dirname(mapped.path)) or mapped
            value = mapped.value()
            if value != self._value:
                self._bind(mapped, value)
                return True
            if not self._lax and not mapped.is_watched:
                raise Unavailable("nobody watches for forks", hint=_HINT)
            return False

    def _look_for_page(self) -> bool:
        mapped = map_page(self._page_path)
        if mapped is None:
            if not self._lax:
                raise Unavailable(f"no generation page: {self._page_path}", hint=_HINT)
            return False
        self._bind(mapped, mapped.value())
        if mapped.boottime_ns >= self._made_at_ns:
            return True
        if not self._lax and not mapped.is_watched:
            raise Unavailable("nobody watches for forks", hint=_HINT)
        return False


class Unforked:
    """The context manager that `unforked` returns; entering gives its guard."""

    __slots__ = ("_guard", "_source", "_strict")

    def __init__(self, source: Source, *, strict: bool) -> None:
        self._source = source
        self._strict = strict

    def __enter__(self) -> Guard:
        self._guard = Guard(self._source, strict=self._strict)
        if self._strict:
            self._guard.forked()
        return self._guard

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None and self._guard.forked():
            raise Forked(
                "the virtual machine was forked inside the block", hint="throw away what the block made and repeat it"
            )


def unforked(source: Source = "auto", *, strict: bool = False) -> Unforked:
    """A block whose result must not be shared with a clone: raises Forked at its end if a fork fell inside.

    Use nothing that the block made before its end was reached. An exception from the block itself goes through
    unchanged. With `strict`, raises Unavailable at the begin or the end where nobody would have noticed a fork.
    """
    return Unforked(source, strict=strict)
