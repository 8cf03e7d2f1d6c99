# SPDX-License-Identifier: Apache-2.0
"""Decides whether a file may be run, or obeyed, as root: nobody but its owner can have put it there or can change it.

Every directory from the root down to the file, and the file, must belong to root and be writable by nobody else. The
walk opens one component after the other by descriptor and never follows a symbolic link by itself: a link's target is
walked the same way. What `Inspector.check` returns is the path without links that was walked; since only root can
change any component of it, running that path runs the checked file. Nothing is read and nothing is changed here.
"""

from __future__ import annotations

import errno
import os
import stat
from dataclasses import dataclass
from types import TracebackType

from vmfork.annotations import Self
from vmfork.errors import VmforkError

_MAX_LINKS = 16
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


class Untrusted(VmforkError):
    """Somebody other than the owner could have chosen what runs; the message names the component, the hint the cure."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """A trusted file or directory: `path` holds no links, and is below the inspector's root if that has one."""

    path: str
    status: os.stat_result


class Inspector:
    """Checks paths below one root; a context manager that keeps the directories it has already walked open.

    With root "" owners must be uid 0. Below a fake root only the components below it count, the caller's own uid is
    trusted too, and absolute links are followed inside of it.
    """

    def __init__(self, root: str = "") -> None:
        self._root = root
        self._owners = frozenset({0, os.geteuid()} if root else {0})
        self._directories: dict[tuple[str, ...], int] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for descriptor in self._directories.values():
            os.close(descriptor)
        self._directories.clear()

    def check(self, path: str) -> Checked:
        """Walk to `path` (absolute, below the root); raises Untrusted, or OSError where the way ends."""
        pending = _components(path.removeprefix(self._root))
        here: tuple[str, ...] = ()
        status: os.stat_result | None = None
        links = 0
        while pending:
            name = pending.pop()
            if name == "..":
                here, status = here[:-1], None
                continue
            there = (*here, name)
            if pending and there in self._directories:
                here = there
                continue
            descriptor = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self._directory(here))
            kept = False
            try:
                status = os.fstat(descriptor)
                if stat.S_ISLNK(status.st_mode):
                    links += 1
                    target = self._target(descriptor, self._shown(there), status, links=links)
                    here = () if target.startswith("/") else here
                    pending += _components(target)
                    continue
                self._check_access(self._shown(there), status)
                here = there
                if pending:
                    if not stat.S_ISDIR(status.st_mode):
                        raise NotADirectoryError(errno.ENOTDIR, "Not a directory", self._shown(there))
                    self._directories[there] = descriptor
                    kept = True
            finally:
                if not kept:
                    os.close(descriptor)
        return Checked(path=self._shown(here), status=status or os.fstat(self._directory(here)))

    def check_program(self, path: str) -> Checked:
        """As `check`, for a file to run: regular, and without set-user-ID or set-group-ID bits."""
        checked = self.check(path)
        mode = checked.status.st_mode
        if not stat.S_ISREG(mode):
            raise Untrusted(f"{checked.path} is not a regular file", hint=f"move {checked.path} away")
        if mode & (stat.S_ISUID | stat.S_ISGID):
            raise Untrusted(f"{checked.path} has a setuid or setgid bit", hint=f"chmod ug-s {checked.path}")
        return checked

    def _shown(self, parts: tuple[str, ...]) -> str:
        return f"{self._root}/{'/'.join(parts)}"

    def _directory(self, parts: tuple[str, ...]) -> int:
        if parts not in self._directories:
            # Only the root itself is opened here: every other directory was walked through and kept.
            descriptor = os.open(self._root or "/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                if not self._root:
                    self._check_access("/", os.fstat(descriptor))
            except Untrusted:
                # Not kept: what is kept counts as trusted, and the next path must fail here as well.
                os.close(descriptor)
                raise
            self._directories[parts] = descriptor
        return self._directories[parts]

    def _check_access(self, shown: str, status: os.stat_result) -> None:
        if status.st_uid not in self._owners:
            raise Untrusted(f"{shown} belongs to uid {status.st_uid}", hint=f"chown root {shown}")
        if status.st_mode & _OTHERS_WRITE:
            raise Untrusted(f"{shown} is writable by others than its owner", hint=f"chmod go-w {shown}")

    def _target(self, descriptor: int, shown: str, status: os.stat_result, *, links: int) -> str:
        if status.st_uid not in self._owners:
            raise Untrusted(f"the link {shown} belongs to uid {status.st_uid}", hint=f"chown -h root {shown}")
        if links > _MAX_LINKS:
            raise Untrusted(
                f"{shown} leads through more than {_MAX_LINKS} symbolic links", hint="link to the file itself"
            )
        return os.readlink("", dir_fd=descriptor)


def _components(path: str) -> list[str]:
    """The components in reverse, so that the next one is popped from the end."""
    return [part for part in reversed(path.split("/")) if part not in ("", ".")]
