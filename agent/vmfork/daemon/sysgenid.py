# SPDX-License-Identifier: Apache-2.0
"""/dev/sysgenid for programs linked to AWS-LC: a file whose first four bytes are the generation, little-endian.

The library was written for a kernel device that changes the number before the guest runs. Ours changes it a moment
after, and AWS-LC aborts the program when the number changes inside of RAND_bytes: hence off by default, only with a
live edge, and never in the place of a real device.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
import stat

from vmfork.errors import InputError
from vmfork.pagefile import open_in_place
from vmfork.paths import Paths

log = logging.getLogger(__name__)

_SIZE = 4096
_TARGET = "../run/vmfork/sysgenid"


class SysGenId:
    """The file and the link to it, while they are wanted."""

    def __init__(self, paths: Paths) -> None:
        self._paths = paths
        self._map: mmap.mmap | None = None

    def offer(self, generation: int, *, wanted: bool) -> None:
        """Make file and link, or take them away."""
        if not wanted:
            self.remove()
        elif self._map is None:
            try:
                self._make(generation)
            except (OSError, InputError) as error:
                log.error("/dev/sysgenid cannot be offered: %s", error)

    def publish(self, generation: int) -> None:
        """Follow a fork; the number is 32 bits wide and starts over at its end."""
        if self._map is not None:
            memoryview(self._map).cast("I")[0] = generation & 0xFFFF_FFFF

    def remove(self) -> None:
        """The link first, so that no program that starts now finds a number that nobody changes any more."""
        if self._map is None:
            return
        self._map = None
        with contextlib.suppress(OSError):
            if os.readlink(self._paths.dev_sysgenid) == _TARGET:
                os.unlink(self._paths.dev_sysgenid)
            os.unlink(self._paths.sysgenid)

    def _make(self, generation: int) -> None:
        link = self._paths.dev_sysgenid
        with contextlib.suppress(FileNotFoundError):
            if not stat.S_ISLNK(os.lstat(link).st_mode) or os.readlink(link) != _TARGET:
                raise InputError(link, "is not ours", hint="a real device is better than a file; SysGenId=no")
        descriptor = open_in_place(self._paths.sysgenid, bytes(_SIZE))
        try:
            self._map = mmap.mmap(descriptor, _SIZE)
        finally:
            os.close(descriptor)
        self.publish(generation)
        if not os.path.lexists(link):
            os.symlink(_TARGET, link)
