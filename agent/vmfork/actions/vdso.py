# SPDX-License-Identifier: Apache-2.0
"""The generation of the kernel's random number generator, as the kernel itself publishes it to processes.

Since Linux 6.11 each new base key raises a counter in a page that is mapped into every process for the vDSO's
getrandom(). It is the only proof of a new key that userspace can have: two reads that differ prove nothing, since they
always do. Read only; None where the kernel does not publish it or the page does not look as expected.
"""

from __future__ import annotations

import ctypes
import os
import re
import struct
from collections.abc import Mapping

# struct vdso_rng_data: u64 generation, u8 is_ready, padding. Linux 6.15 gave it a page of its own (the third one of
# [vvar], enum vdso_pages); before, it stood at an offset of each architecture's own in the first page.
_OWN_PAGE_SINCE = (6, 15)
_PUBLISHED_SINCE = (6, 11)
_OWN_PAGE_NUMBER = 2
_FIRST_PAGE_OFFSETS: Mapping[str, int] = {"x86_64": 640, "aarch64": 480, "s390x": 768}
_LAYOUT = struct.Struct("=QB7x")


def kernel_version() -> tuple[int, int]:
    """The running kernel's version, (0, 0) where its name is not understood."""
    found = re.match(r"(\d+)\.(\d+)", os.uname().release)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def random_generation() -> int | None:
    """The counter of base keys, or None where this kernel does not publish it."""
    offset = _offset(kernel_version(), os.uname().machine, os.sysconf("SC_PAGE_SIZE"))
    start, end = _vvar()
    if offset is None or start + offset + _LAYOUT.size > end or not _is_readable(start + offset):
        return None
    generation, ready = _LAYOUT.unpack(ctypes.string_at(start + offset, _LAYOUT.size))
    # The counter is stored one above the kernel's own, so that 0 means "never seeded".
    return generation if ready == 1 and 0 < generation < 2**48 else None


def _offset(version: tuple[int, int], machine: str, page: int) -> int | None:
    if version >= _OWN_PAGE_SINCE:
        return _OWN_PAGE_NUMBER * page
    return _FIRST_PAGE_OFFSETS.get(machine) if version >= _PUBLISHED_SINCE else None


def _vvar() -> tuple[int, int]:
    try:
        with open("/proc/self/maps", encoding="ascii", errors="replace") as maps:
            for line in maps:
                if line.rstrip().endswith("[vvar]"):
                    start, _, end = line.split(maxsplit=1)[0].partition("-")
                    return int(start, 16), int(end, 16)
    except OSError:
        pass
    return 0, 0


def _is_readable(address: int) -> bool:
    """Whether a touch survives: a page that a kernel configuration leaves out answers with SIGBUS, so a child tries."""
    child = os.fork()
    if child == 0:
        try:
            ctypes.string_at(address, _LAYOUT.size)
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return status == 0
