# SPDX-License-Identifier: Apache-2.0
"""Makes a listening unix stream socket in the file system, in place of one that nobody closed."""

from __future__ import annotations

import errno
import os
import socket
import stat

from vmfork.varlink.address import Reachable

_BACKLOG = 4096


def identity(path: str) -> tuple[int, int]:
    """Device and inode of the file itself at `path`."""
    found = os.lstat(path)
    return found.st_dev, found.st_ino


def _is_stale(path: str) -> bool:
    """Whether an unused socket is at `path`; False if nothing is, an error if something else is."""
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return False
    if not stat.S_ISSOCK(found.st_mode):
        raise FileExistsError(errno.EEXIST, "something that is no socket is in its place", path)
    return True


def listen(path: str, mode: int) -> tuple[socket.socket, tuple[int, int]]:
    """A listening socket at `path` and its (device, inode).

    It is bound and given its mode under another name, and listens before it gets this one: nobody ever finds it with
    wrong permissions or refusing connections. OSError; something else than a socket at `path` is left alone.
    """
    directory, name = os.path.split(path)
    temporary = os.path.join(directory, f".{name}.{os.getpid()}")
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.settimeout(0)
        if _is_stale(temporary):
            os.unlink(temporary)
        with Reachable(temporary) as address:
            listener.bind(address)
        try:
            os.chmod(temporary, mode)
            listener.listen(_BACKLOG)
            inode = identity(temporary)
            _is_stale(path)
            os.rename(temporary, path)
        except OSError:
            os.unlink(temporary)
            raise
    except OSError:
        listener.close()
        raise
    return listener, inode
