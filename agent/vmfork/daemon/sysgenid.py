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
    """The file and the link to it, while they are wanted; `problems` say why programs do not find them then."""

    def __init__(self, paths: Paths) -> None:
        self._paths = paths
        self._map: mmap.mmap | None = None
        self.problems: tuple[str, ...] = ()

    def offer(self, generation: int, *, wanted: bool) -> None:
        """Make file and link, or take them away."""
        self.problems = ()
        if not wanted:
            self.remove()
            return
        try:
            there = self._link()
            if self._map is None:
                self._make(generation)
            if not there:
                os.symlink(_TARGET, self._paths.dev_sysgenid)
        except (OSError, InputError) as error:
            self.problems = (f"SysGenId=yes, and yet it is not offered: {error}",)
            log.error("%s", *self.problems)

    def publish(self, generation: int) -> None:
        """Follow a fork; the number is 32 bits wide and starts over at its end."""
        if self._map is not None:
            memoryview(self._map).cast("I")[0] = generation & 0xFFFF_FFFF

    def remove(self) -> None:
        """The link first, so that no program that starts now finds a number that nobody changes any more.

        Those of a daemon that was killed are taken away as well.
        """
        self._map = None
        with contextlib.suppress(OSError, InputError):
            if self._link():
                os.unlink(self._paths.dev_sysgenid)
        with contextlib.suppress(OSError):
            os.unlink(self._paths.sysgenid)

    def _link(self) -> bool:
        """Whether our link is there; InputError where something else is in its place."""
        link = self._paths.dev_sysgenid
        try:
            if stat.S_ISLNK(os.lstat(link).st_mode) and os.readlink(link) == _TARGET:
                return True
        except FileNotFoundError:
            return False
        raise InputError(link, "is not ours and is left alone", hint="a real device is better than a file; SysGenId=no")

    def _make(self, generation: int) -> None:
        descriptor = open_in_place(self._paths.sysgenid, bytes(_SIZE))
        try:
            self._map = mmap.mmap(descriptor, _SIZE)
        finally:
            os.close(descriptor)
        self.publish(generation)
