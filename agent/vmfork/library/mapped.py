# SPDX-License-Identifier: Apache-2.0
"""The two words that change with a fork, mapped into this process: the page's generation and vmclock's counter.

A mapping is made once per file and shared by all guards of the process. Only aligned 8-byte loads are done through it:
each is one load in CPython, so no barrier is needed to ask whether the value is still the same.
"""

from __future__ import annotations

import mmap
import os
import stat
import time

from vmfork.page import ABI_VERSION, DETECTION_OFFSET, GENERATION_OFFSET, MAGIC, PAGE_SIZE

# struct vmclock_abi of Linux, include/uapi/linux/vmclock-abi.h; spelled here because the parser that the daemon uses
# loads dataclasses, which alone cost more than a guard may.
_VMCLOCK_MAGIC = b"VCLK"
_VMCLOCK_SIZE_WITH_COUNTER = 0x70
_VMCLOCK_COUNTER_PRESENT = 1 << 8
_VMCLOCK_COUNTER = 0x68
_VMCLOCK_NAMES = 8

# A hypervisor updates a vmclock in far less, and before the guest runs at all.
_UPDATE_SEC = 0.005


class Mapped:
    """One mapped file: `words` are its 8-byte words, `index` is the one that changes with a fork."""

    __slots__ = ("identity", "index", "is_device", "is_page", "path", "words")

    def __init__(self, path: str, words: memoryview[int], status: os.stat_result, *, is_page: bool) -> None:
        self.path = path
        self.words = words
        self.index = (GENERATION_OFFSET if is_page else _VMCLOCK_COUNTER) // 8
        self.identity = (status.st_dev, status.st_ino)
        self.is_device = stat.S_ISCHR(status.st_mode)
        self.is_page = is_page

    @property
    def is_watched(self) -> bool:
        """Whether a fork would change the word: always with a vmclock, with the page while the daemon watches."""
        return not self.is_page or self.words[DETECTION_OFFSET // 8] & 0xFFFF_FFFF != 0

    @property
    def boottime_ns(self) -> int:
        """CLOCK_BOOTTIME of the last fork, of a page."""
        return self.words[4]

    def value(self) -> int:
        """The word, when no update of a vmclock is under way."""
        if not self.is_page:
            give_up_at = time.monotonic() + _UPDATE_SEC
            while (self.words[1] >> 32) % 2 and time.monotonic() < give_up_at:
                time.sleep(0.0001)
        return self.words[self.index]

    def is_current(self) -> bool:
        """Whether the path still leads to the mapped file."""
        try:
            status = os.stat(self.path)
        except OSError:
            return False
        return self.identity == (status.st_dev, status.st_ino)


_known: dict[str, Mapped] = {}


def map_page(path: str) -> Mapped | None:
    """The page at `path`; None while there is none, or none that can be understood."""
    return _mapped(path, is_page=True)


def map_vmclock(devices: str) -> Mapped | None:
    """The vmclock with the smallest number below `devices` that may be mapped and counts forks, else None."""
    for number in range(_VMCLOCK_NAMES):
        found = _mapped(f"{devices}/vmclock{number}", is_page=False)
        if found is not None:
            return found
    return None


def _mapped(path: str, *, is_page: bool) -> Mapped | None:
    known = _known.get(path)
    if known is not None and known.is_current():
        return known
    # No exception where nothing is there: without a daemon, guards ask again and again.
    if not os.access(path, os.F_OK):
        return None
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError:
        return None
    try:
        status = os.fstat(fd)
        if stat.S_ISREG(status.st_mode) and status.st_size < PAGE_SIZE:
            return None
        # The vmclock driver maps exactly one page of the machine's size.
        memory = mmap.mmap(fd, PAGE_SIZE if is_page else mmap.PAGESIZE, mmap.MAP_SHARED, mmap.PROT_READ)
    except (OSError, ValueError):
        return None
    finally:
        os.close(fd)
    if not (_is_page if is_page else _counts_forks)(memory):
        memory.close()
        return None
    found = Mapped(path, memoryview(memory).cast("Q"), status, is_page=is_page)
    _known[path] = found
    return found


def _is_page(memory: mmap.mmap) -> bool:
    return memory[:4] == MAGIC and int.from_bytes(memory[4:8], "little") >= ABI_VERSION


def _counts_forks(memory: mmap.mmap) -> bool:
    return (
        memory[:4] == _VMCLOCK_MAGIC
        and int.from_bytes(memory[4:8], "little") >= _VMCLOCK_SIZE_WITH_COUNTER
        and int.from_bytes(memory[8:10], "little") == 1
        and bool(int.from_bytes(memory[0x18:0x20], "little") & _VMCLOCK_COUNTER_PRESENT)
    )
