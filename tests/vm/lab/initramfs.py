# SPDX-License-Identifier: Apache-2.0
"""An initial RAM file system, written as a `newc` archive without cpio and without root.

Two uses: a few modules and a script that mount a guest's disk, and a whole mini guest. Files keep their mode and get
owner root and time 0, so that equal input makes an equal archive. Uncompressed: QEMU hands it over as it is, and
unpacking would cost an emulated guest seconds.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from types import TracebackType


class Archive:
    """An archive that is being written to `path`; a context manager."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self._inode = 0
        self._directories = {""}

    def __enter__(self) -> Archive:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self._entry("TRAILER!!!", 0, b"")
        self._file.close()

    def directory(self, name: str, *, mode: int = 0o755) -> None:
        """Add a directory and those above it, once."""
        name = name.strip("/")
        if name not in self._directories:
            self.directory(os.path.dirname(name))
            self._directories.add(name)
            self._entry(name, stat.S_IFDIR | mode, b"")

    def file(self, name: str, content: bytes, *, mode: int = 0o644) -> None:
        """Add a regular file."""
        self._member(name, stat.S_IFREG | mode, content)

    def link(self, name: str, target: str) -> None:
        """Add a symbolic link. A directory of this name, in a tree that is added later, is reached through it."""
        self._directories.add(name.strip("/"))
        self._member(name, stat.S_IFLNK | 0o777, os.fsencode(target))

    def device(self, name: str, *, major: int, minor: int) -> None:
        """Add a character device."""
        self._member(name, stat.S_IFCHR | 0o600, b"", (major, minor))

    def tree(self, root: Path, *, below: str = "", skip: tuple[str, ...] = ()) -> None:
        """Add all directories, files and links below `root`; `skip` names paths relative to it that stay out."""
        for directory, names, files in os.walk(root):
            relative = os.path.relpath(directory, root)
            names[:] = [name for name in sorted(names) if os.path.normpath(f"{relative}/{name}") not in skip]
            for name in [*names, *sorted(files)]:
                source = Path(directory, name)
                self._copy(source, os.path.normpath(f"{below}/{relative}/{name}").strip("/"))

    def _copy(self, source: Path, name: str) -> None:
        status = source.lstat()
        if stat.S_ISDIR(status.st_mode):
            self.directory(name, mode=stat.S_IMODE(status.st_mode))
        elif stat.S_ISLNK(status.st_mode):
            self.link(name, os.readlink(source))
        elif stat.S_ISREG(status.st_mode):
            self.file(name, source.read_bytes(), mode=stat.S_IMODE(status.st_mode))

    def _member(self, name: str, mode: int, content: bytes, device: tuple[int, int] = (0, 0)) -> None:
        name = name.strip("/")
        self.directory(os.path.dirname(name))
        self._entry(name, mode, content, device)

    def _entry(self, name: str, mode: int, content: bytes, device: tuple[int, int] = (0, 0)) -> None:
        self._inode += 1
        path = os.fsencode(name) + b"\0"
        links = 2 if stat.S_ISDIR(mode) else 1
        # inode, mode, uid, gid, links, mtime, size, device (2), special device (2), length of the name, checksum
        fields = (self._inode, mode, 0, 0, links, 0, len(content), 0, 0, *device, len(path), 0)
        header = b"070701" + b"".join(b"%08X" % field for field in fields)
        self._padded(header + path)
        self._padded(content)

    def _padded(self, data: bytes) -> None:
        self._file.write(data + b"\0" * (-len(data) % 4))
