# SPDX-License-Identifier: Apache-2.0
"""Replace a small file so that a reader, and a guest that loses power, sees the old content or the new, never less."""

from __future__ import annotations

import contextlib
import os

from vmfork.errors import InputError

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
        data = b""
        while len(data) <= limit and (chunk := os.read(descriptor, limit + 1 - len(data))):
            data += chunk
    finally:
        os.close(descriptor)
    if len(data) > limit:
        raise InputError(path, f"is larger than {limit} bytes")
    return data
