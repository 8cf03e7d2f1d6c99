# SPDX-License-Identifier: Apache-2.0
"""Addresses of unix stream sockets in the file system, of any length.

sun_path holds 107 bytes and a NUL. A longer path is reached through an O_PATH descriptor of its directory:
/proc/self/fd/N/NAME; only a NAME that is itself too long cannot be reached (OSError, ENAMETOOLONG).
"""

from __future__ import annotations

import errno
import os

_SUN_PATH = 107


class Reachable:
    """Context manager: an address of the socket `path` that fits sun_path, valid inside the block."""

    __slots__ = ("_directory", "_path")

    def __init__(self, path: str) -> None:
        self._path = path
        self._directory = -1

    def __enter__(self) -> str:
        if len(os.fsencode(self._path)) <= _SUN_PATH:
            return self._path
        directory, name = os.path.split(self._path)
        self._directory = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        short = f"/proc/self/fd/{self._directory}/{name}"
        if len(os.fsencode(short)) > _SUN_PATH:
            self.__exit__()
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG), self._path)
        return short

    def __exit__(self, *_exception: object) -> None:
        if self._directory >= 0:
            os.close(self._directory)
            self._directory = -1
