# SPDX-License-Identifier: Apache-2.0
"""Read a few bytes of guest-physical memory through /dev/mem, read-only, and say why where the kernel refuses.

The page is mapped once and stays mapped, so that a later read is a copy of 16 bytes. Below a root prefix a regular
file stands for the memory; that is read without a map, since a file may shrink and its map then kills the reader.
Nothing here writes, and nothing knows what the bytes mean.
"""

from __future__ import annotations

import errno
import mmap
import os
import stat
import sys

from vmfork.annotations import TYPE_CHECKING
from vmfork.errors import AbsentError, InputError
from vmfork.paths import Paths
from vmfork.truths.sysfile import read_start, shown

if TYPE_CHECKING:
    from typing import Literal

_MAXIMUM_SIZE = 4096
_MAXIMUM_MAPS = 8
_ADDRESS_END = 1 << 52
_WORDS: dict[int, Literal["Q", "I", "H", "B"]] = {8: "Q", 4: "I", 2: "H", 1: "B"}
_LOCKDOWN_LIMIT = 256


class PhysicalMemory:
    """The memory behind `paths.physical_memory`, opened at the first read and again where the file was replaced."""

    def __init__(self, paths: Paths) -> None:
        self._paths = paths
        self._fd = -1
        self._identity: tuple[int, int] | None = None
        self._is_file = False
        self._maps: dict[tuple[int, int], mmap.mmap] = {}

    def read(self, address: int, size: int) -> bytes:
        """`size` bytes (at most 4096) from `address`, in memory order; AbsentError with the reason and a hint."""
        if not 0 < size <= _MAXIMUM_SIZE or not 0 <= address <= _ADDRESS_END - size:
            raise InputError(self._place(), f"{size} bytes at {address:#x} are no memory")
        self._open()
        if self._is_file:
            return self._read_file(address, size)
        start = address - address % mmap.PAGESIZE
        end = -(-(address + size) // mmap.PAGESIZE) * mmap.PAGESIZE
        return _copy(self._map(start, end - start), address - start, size)

    def close(self) -> None:
        """Unmap and close; a later read opens anew."""
        for pages in self._maps.values():
            pages.close()
        self._maps.clear()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        self._identity = None

    def _place(self) -> str:
        return shown(self._paths.physical_memory)

    def _open(self) -> None:
        path = self._paths.physical_memory
        try:
            found = os.stat(path)
            if self._identity == (found.st_dev, found.st_ino):
                return
            self.close()
            # O_NONBLOCK: a FIFO in its place must not block.
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            found = os.fstat(self._fd)
        except OSError as error:
            self.close()
            raise self._refused(error, opening=True) from error
        self._is_file = stat.S_ISREG(found.st_mode)
        if not self._is_file and not stat.S_ISCHR(found.st_mode):
            self.close()
            raise AbsentError(f"{self._place()} is neither a device nor a file")
        self._identity = (found.st_dev, found.st_ino)

    def _read_file(self, address: int, size: int) -> bytes:
        try:
            data = os.pread(self._fd, size, address)
        except OSError as error:
            raise self._refused(error, opening=False) from error
        if len(data) < size:
            raise AbsentError(f"{self._place()} ends before {address + size:#x}")
        return data

    def _map(self, start: int, length: int) -> mmap.mmap:
        pages = self._maps.get((start, length))
        if pages is None:
            try:
                pages = mmap.mmap(self._fd, length, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ, offset=start)
            except OSError as error:
                raise self._refused(error, opening=False) from error
            if len(self._maps) >= _MAXIMUM_MAPS:
                self._maps.pop(next(iter(self._maps))).close()
            self._maps[start, length] = pages
        return pages

    def _refused(self, error: OSError, *, opening: bool) -> AbsentError:
        reason, hint = explain(error.errno or errno.EIO, opening=opening, lockdown=self._lockdown())
        return AbsentError(f"{self._place()}: {reason}", hint=hint)

    def _lockdown(self) -> str:
        try:
            return read_start(self._paths.lockdown, _LOCKDOWN_LIMIT).decode("ascii", "replace")
        except AbsentError:
            return ""


def _copy(pages: mmap.mmap, offset: int, size: int) -> bytes:
    """Copy out in the largest words that are aligned.

    On arm64 memory that is not RAM is mapped as device memory, where an access that is not aligned to its own size
    is a fault; the words are also what a hypervisor writes in one piece.
    """
    word = next(word for word in _WORDS if offset % word == 0 and size % word == 0)
    with memoryview(pages) as view, view[offset : offset + size] as part, part.cast(_WORDS[word]) as words:
        return b"".join(value.to_bytes(word, sys.byteorder) for value in words)


def explain(code: int, *, opening: bool, lockdown: str = "") -> tuple[str, str | None]:
    """Why the kernel refused with this errno, at open or at map, and what would help, if anything.

    `lockdown` is the text of /sys/kernel/security/lockdown, whose word in brackets is in force.
    """
    if opening:
        return _explain_open(code, lockdown)
    if code in (errno.EPERM, errno.EACCES):
        return (
            "the kernel does not let this range be mapped (CONFIG_STRICT_DEVMEM or CONFIG_IO_STRICT_DEVMEM: it is "
            "RAM, or claimed by a driver)",
            "boot with iomem=relaxed on the kernel command line, or rely on the kernel's own announcements",
        )
    return f"reading memory failed: {os.strerror(code)}", None


def _explain_open(code: int, lockdown: str) -> tuple[str, str | None]:
    if code in (errno.ENOENT, errno.ENXIO, errno.ENODEV):
        return (
            "this kernel has no /dev/mem (CONFIG_DEVMEM is off), or it is hidden from this process",
            "rely on the kernel's own announcements, or use a kernel with CONFIG_DEVMEM",
        )
    for mode in ("integrity", "confidentiality"):
        if code == errno.EPERM and f"[{mode}]" in lockdown:
            return (
                f"kernel lockdown is in force ({mode}), which closes /dev/mem",
                "lockdown comes with Secure Boot or lockdown= on the kernel command line",
            )
    if code in (errno.EPERM, errno.EACCES):
        return "may not be opened", "run as root with CAP_SYS_RAWIO"
    return f"cannot be opened: {os.strerror(code)}", None
