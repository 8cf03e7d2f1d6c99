# SPDX-License-Identifier: Apache-2.0
"""Replacing a file so that it is whole at every instant: temp in the same directory, fsync, rename, fsync directory.

A reader, a crash and a kill see the old content or the new, never an empty or missing file. The one exception, a file
that is itself a mount point and cannot be renamed over, is written in place and reported as such.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator

from vmfork.errors import ActionError
from vmfork.paths import Paths

_SELINUX = "security.selinux"
_MAX_LINKS = 40
_MAX_TEXT = 1 << 20


def temporary_name(path: str) -> str:
    """Where the next content of `path` is prepared: always the same name, so a killed run leaves at most one."""
    directory, name = os.path.split(path)
    return os.path.join(directory, f".{name}.vmfork-new")


def resolve(paths: Paths, path: str) -> str:
    """Where a path ends after symbolic links; absolute links are taken below the root. ActionError on a loop."""
    for _ in range(_MAX_LINKS):
        try:
            target = os.readlink(path)
        except FileNotFoundError:
            return path
        except OSError as error:
            if error.errno == errno.EINVAL:
                return path
            raise
        path = paths.at(target) if os.path.isabs(target) else os.path.join(os.path.dirname(path), target)
    raise ActionError(f"{path}: too many symbolic links")


def read_text(path: str) -> str:
    """The text of a small file, its first MiB; bytes that are no text survive a later write. Empty where none is.

    Raises ActionError where it is there and cannot be read.
    """
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            return file.read(_MAX_TEXT)
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise ActionError(f"{path}: cannot be read: {error.strerror}") from error


def fsync_directory(path: str) -> None:
    """Make the renames in a directory survive a power cut."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def replace_file(path: str, data: bytes, *, mode: int) -> bool:
    """Replace or create a file; True if it had to be written in place because it is a mount point.

    `mode` is for a new file; an existing one keeps its mode, owner and SELinux label. The last component must not be
    a symbolic link (see `resolve`). ActionError says which file, and why it cannot be written.
    """
    with reported(path):
        try:
            install(prepare(path, data, mode=mode), path)
        except OSError as error:
            if error.errno not in (errno.EBUSY, errno.EXDEV, errno.EROFS) or not os.path.exists(path):
                raise
            _write_in_place(path, data)
            return True
    return False


def prepare(path: str, data: bytes, *, mode: int) -> str:
    """Write the next content of `path` beside it, synced to disk; its temporary name. OSError leaves nothing behind."""
    new = temporary_name(path)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(new)
    fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        try:
            _write_all(fd, data)
            take_attributes(fd, path, mode=mode)
            os.fsync(fd)
        finally:
            os.close(fd)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(new)
        raise
    return new


def install(new: str, path: str) -> None:
    """Rename a prepared file over `path`, durably. OSError leaves the old file and nothing else."""
    try:
        os.rename(new, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(new)
        raise
    fsync_directory(os.path.dirname(path))


def take_attributes(fd: int, path: str, *, mode: int) -> None:
    """Give an open new file the mode, owner and SELinux label of `path`, or `mode` where there is none yet."""
    try:
        old = os.lstat(path)
    except FileNotFoundError:
        os.fchmod(fd, mode)
        return
    if (old.st_uid, old.st_gid) != (os.geteuid(), os.getegid()):
        os.fchown(fd, old.st_uid, old.st_gid)
    os.fchmod(fd, stat.S_IMODE(old.st_mode))
    with contextlib.suppress(OSError):
        # Absent without SELinux; a policy that forbids it gives the directory's default label, as any new file gets.
        os.setxattr(fd, _SELINUX, os.getxattr(path, _SELINUX, follow_symlinks=False))


@contextlib.contextmanager
def reported(path: str) -> Iterator[None]:
    """Turn an OSError of the block into an ActionError that names the file and says what to do."""
    try:
        yield
    except OSError as error:
        hints = {
            errno.EROFS: "the file system is read-only: make it writable, or disable this hook",
            errno.ENOSPC: "the disk is full: free some space, then run the hook again",
            errno.EDQUOT: "the disk quota is used up",
            errno.EPERM: "is the file immutable (lsattr)?",
            errno.EACCES: "run this as root",
        }
        hint = hints.get(error.errno) if error.errno is not None else None
        raise ActionError(f"{path}: {error.strerror or error}", hint=hint) from error


def _write_in_place(path: str, data: bytes) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        _write_all(fd, data)
        os.ftruncate(fd, len(data))
        os.fsync(fd)
    finally:
        os.close(fd)


def beginning(path: str, limit: int) -> str:
    """So many bytes of a file as text, those that are no UTF-8 escaped; "" where it cannot be read."""
    try:
        with open(path, "rb") as file:
            return file.read(limit).decode("utf-8", "surrogateescape")
    except OSError:
        return ""


def _write_all(fd: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(fd, rest) :]
