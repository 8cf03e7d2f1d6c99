# SPDX-License-Identifier: Apache-2.0
"""Replace a small file so that a reader, and a guest that loses power, sees the old content or the new, never less.

And read one, with the patience that a kernel deserves which is short of memory or descriptors for a moment.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Callable

from vmfork.annotations import TypeVar
from vmfork.errors import InputError, UnreadableError

T = TypeVar("T")

# What is said once and not again: memory or descriptors ran out, a disk or a path to it stumbled.
_PASSING = frozenset({errno.EAGAIN, errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE, errno.ETIMEDOUT})
_PAUSES_SEC = (0.01, 0.03, 0.1, 0.2)

_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


def replace(path: str, data: bytes, *, mode: int = 0o600, durable: bool) -> None:
    """Write a temporary file beside `path` and rename it over.

    `durable` adds fsync of file and directory, for what must survive a power cut; files in /run do without. OSError
    carries the path; the temporary file is gone then.
    """
    temporary = f"{path}.new"
    try:
        descriptor = os.open(temporary, _NEW, mode)
    except FileExistsError:
        # Whoever may write to the directory is root: a left-over of a killed run is all that can stand here.
        os.unlink(temporary)
        descriptor = os.open(temporary, _NEW, mode)
    try:
        try:
            os.fchmod(descriptor, mode)
            write_all(descriptor, data)
            if durable:
                os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.rename(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    if durable:
        sync_directory(os.path.dirname(path))


def write_all(descriptor: int, data: bytes) -> None:
    """Write everything, in as many pieces as the kernel wants; OSError when it takes no more."""
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def sync_directory(path: str) -> None:
    """Make a rename or a new file in this directory survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_bounded(path: str, limit: int) -> bytes:
    """The content of a regular file of at most `limit` bytes; InputError if it is larger, OSError if unreadable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        data = read_up_to(descriptor, limit + 1)
    finally:
        os.close(descriptor)
    if len(data) > limit:
        raise InputError(path, f"is larger than {limit} bytes")
    return data


def read_up_to(descriptor: int, size: int) -> bytes:
    """So many bytes, fewer only at the end of the file: one read that fails half-way returns what it had, no error."""
    data = b""
    while len(data) < size and (chunk := os.read(descriptor, size - len(data))):
        data += chunk
    return data


def may_pass(error: OSError) -> bool:
    """Whether it says nothing about the file itself: the same read may succeed a little later."""
    return error.errno in _PASSING


def patiently(read: Callable[[], T]) -> T:
    """What `read` returns. While it fails by what may pass it is tried again, for a third of a second; then OSError."""
    for pause in _PAUSES_SEC:
        try:
            return read()
        except OSError as error:
            if not may_pass(error):
                raise
        time.sleep(pause)
    return read()


def read_patiently(path: str, limit: int) -> bytes | None:
    """Like `read_bounded`, tried again for what may pass; None where there is no such file.

    UnreadableError if the kernel goes on refusing, a plain InputError for what cannot be a file of ours.
    """
    try:
        return patiently(lambda: read_bounded(path, limit))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except IsADirectoryError as error:
        raise InputError(path, "is a directory") from error
    except OSError as error:
        raise UnreadableError(path, f"cannot be read: {error.strerror}") from error
