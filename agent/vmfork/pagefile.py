# SPDX-License-Identifier: Apache-2.0
"""The file behind a page that programs map: made complete or not at all, kept in place, never trusted blindly.

One inode for as long as the directory lives, so that who mapped it keeps seeing updates over restarts of the writer.
Only the opening is here; what the bytes mean is the business of the page itself.
"""

from __future__ import annotations

import os
import stat


def open_in_place(path: str, initial: bytes) -> int:
    """A read-write descriptor of the file at `path`, mode 0444 and at least as long as `initial`.

    Created with `initial` where it is missing. A file that somebody else could have planted or could still write is
    replaced by a new one, and that is logged. Raises OSError.
    """
    try:
        # O_PATH first: it opens nothing, so a FIFO or a device in the file's place can neither block nor notice.
        probe = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return _create(path, initial)
    try:
        problem = _untrusted(os.fstat(probe))
        if problem is not None:
            warn("%s is %s; it is replaced, programs that mapped it will not see forks", path, problem)
            return _create(path, initial)
        # The daemon runs without CAP_DAC_OVERRIDE: root itself may then not open a file of mode 0444 for writing.
        by_descriptor = f"/proc/self/fd/{probe}"
        os.chmod(by_descriptor, 0o644)
        fd = os.open(by_descriptor, os.O_RDWR | os.O_CLOEXEC)
    finally:
        os.close(probe)
    os.fchmod(fd, 0o444)
    try:
        _reserve(fd, len(initial))
    except OSError:
        os.close(fd)
        raise
    return fd


def _reserve(fd: int, size: int) -> None:
    # Makes longer, fills holes, and never makes smaller: who has mapped more than we know about would die of SIGBUS. A
    # hole must not stay either: where the file system is full by the time of a store into it, that is a SIGBUS, too.
    os.posix_fallocate(fd, 0, size)


def warn(message: str, *arguments: object) -> None:
    """Log a warning; the import is here because programs that only read a page shall not pay for logging."""
    import logging

    logging.getLogger(__name__).warning(message, *arguments)


def _untrusted(status: os.stat_result) -> str | None:
    if not stat.S_ISREG(status.st_mode):
        return "not a regular file"
    if status.st_uid != os.geteuid():
        return "owned by somebody else"
    if status.st_nlink != 1:
        return "linked under another name too"
    if status.st_mode & 0o022:
        return "writable by others"
    return None


def _create(path: str, initial: bytes) -> int:
    # Under a temporary name, then renamed: no reader ever maps a short or empty file.
    directory, name = os.path.split(path)
    os.makedirs(directory, mode=0o755, exist_ok=True)
    temporary = os.path.join(directory, f".{name}.new")
    if os.path.lexists(temporary):
        os.unlink(temporary)
    fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o444)
    try:
        _reserve(fd, len(initial))
        os.pwrite(fd, initial, 0)
        os.fchmod(fd, 0o444)
        os.rename(temporary, path)
    except OSError:
        os.close(fd)
        raise
    return fd
