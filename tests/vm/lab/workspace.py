# SPDX-License-Identifier: Apache-2.0
"""A directory for one run's disks and saved memory, gigabytes of them: beside the cache, and removed at the end.

A run that was killed cannot remove its own; the next one does. A lock that the kernel gives back tells which is dead.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lab import cache

_PREFIX = "run-"


@contextmanager
def workspace() -> Iterator[Path]:
    """A fresh directory that lives as long as this context does."""
    # Two runs that start at once must not sweep away what the other has not locked yet.
    with cache.locked("runs"):
        _sweep()
        directory = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=cache.directory()))
        lock = _lock_file(directory).open("w", encoding="ascii")
        fcntl.flock(lock, fcntl.LOCK_EX)
    with lock:
        try:
            yield directory
        finally:
            _discard(directory)


def _sweep() -> None:
    for directory in cache.directory().glob(f"{_PREFIX}*"):
        if directory.is_dir():
            try:
                with _lock_file(directory).open("r", encoding="ascii") as lock:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    _discard(directory)
            except OSError:
                continue


def _discard(directory: Path) -> None:
    if os.environ.get("VMFORK_LAB_KEEP") != "1":
        cache.remove(directory)
        _lock_file(directory).unlink(missing_ok=True)


def _lock_file(directory: Path) -> Path:
    return directory.with_name(f"{directory.name}.lock")
