# SPDX-License-Identifier: Apache-2.0
"""Bounded reads of the small files by which the kernel shows firmware and devices.

A file may vanish, be a FIFO put there by mistake, or grow without end: no read blocks, and none returns more than the
caller asked for. An operating system's refusal becomes an AbsentError that names the file.
"""

from __future__ import annotations

import errno
import os

from vmfork.errors import AbsentError, InputError

_REFUSED = (errno.EACCES, errno.EPERM)
_NOT_THERE = (errno.ENOENT, errno.ENOTDIR, errno.ENODEV, errno.ENXIO)


def absent(path: str, error: OSError) -> AbsentError:
    """The AbsentError for an OSError on `path`, with the hint that helps where it was a matter of privilege."""
    code = error.errno if error.errno is not None else errno.EIO
    hint = "only root may read it; run as root" if code in _REFUSED else None
    return AbsentError(f"{shown(path)}: {os.strerror(code)}", hint=hint, passing=may_pass(code))


def may_pass(code: int) -> bool:
    """Whether the kernel's reason may pass by itself: neither that something is not there nor that it is forbidden."""
    return code not in (*_REFUSED, *_NOT_THERE)


def shown(path: str) -> str:
    """A path as a message can carry it: a name from firmware may hold line breaks and bytes that are no text."""
    return path if path.isprintable() else ascii(path)[1:-1]


def read_start(path: str, size: int) -> bytes:
    """The first `size` bytes of a file, fewer where it is shorter; AbsentError where it cannot be read."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise absent(path, error) from error
    try:
        data = os.pread(fd, size, 0)
        # kernfs hands out at most one memory page per read, however much is asked for.
        while data and len(data) < size:
            more = os.pread(fd, size - len(data), len(data))
            if not more:
                break
            data += more
    except OSError as error:
        raise absent(path, error) from error
    finally:
        os.close(fd)
    return data


def read_whole(path: str, *, limit: int) -> bytes:
    """A whole file of at most `limit` bytes; InputError where it is larger, AbsentError where it cannot be read."""
    data = read_start(path, limit + 1)
    if len(data) > limit:
        raise InputError(shown(path), f"is larger than {limit} bytes")
    return data
