# SPDX-License-Identifier: Apache-2.0
"""Finished artefacts, built once and kept in ${XDG_CACHE_HOME:-~/.cache}/vmfork-lab.

An artefact is a directory named `<name>-<key>`; the key is a hash of everything it is built from, so a changed recipe
is another artefact and nothing in the cache is ever modified. A build happens in a `.partial` directory under a lock
and is renamed at the end: a killed build leaves nothing that looks finished, two runs never build the same thing.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

log = logging.getLogger(__name__)

_KEPT_PER_NAME = 2


def directory() -> Path:
    """The cache directory, made when it is first asked for."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    path = Path(base) / "vmfork-lab"
    path.mkdir(parents=True, exist_ok=True)
    return path


def key_of(*parts: object) -> str:
    """A short hash over JSON-like values that name what an artefact is built from."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def artefact(name: str, key: str, build: Callable[[Path], None], *, estimate: str = "") -> Path:
    """The directory `<name>-<key>`; if it is not there, `build(directory)` fills it first.

    `estimate` is what a waiting person is told about the length of the build.
    """
    finished = directory() / f"{name}-{key}"
    while not _held(finished):
        with locked(name):
            if not finished.is_dir():
                _build(finished, name, build, estimate)
    os.utime(finished)
    return finished


def _held(path: Path) -> bool:
    """Keep what is there from being pruned by another run for as long as this process lives; False if it is gone."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    try:
        is_same = os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        is_same = False
    if not is_same:
        os.close(descriptor)
    return is_same


def _build(finished: Path, name: str, build: Callable[[Path], None], estimate: str) -> None:
    for leftover in directory().glob(f".partial-{name}-*"):
        remove(leftover)
    partial = directory() / f".partial-{name}-{os.getpid()}"
    partial.mkdir()
    log.info("building %s%s", name, f" ({estimate})" if estimate else "")
    started = time.monotonic()
    try:
        build(partial)
        partial.rename(finished)
    except BaseException:
        remove(partial)
        raise
    log.info("built %s in %.0f s", name, time.monotonic() - started)
    _prune(name)


def _prune(name: str) -> None:
    # The hash has a fixed length, which tells "trixie-<key>" from "trixie-backports-<key>".
    same = [path for path in directory().glob(f"{name}-{'?' * 16}") if path.is_dir()]
    for old in sorted(same, key=lambda path: path.stat().st_mtime)[:-_KEPT_PER_NAME]:
        _remove_unused(old)


def _remove_unused(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        remove(path)
    except BlockingIOError:
        log.info("%s is in use by another run: kept", path.name)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Delete a directory that this lab made; a root built by mmdebstrap holds no mounts."""
    shutil.rmtree(path, ignore_errors=True)


@contextmanager
def locked(name: str) -> Iterator[None]:
    """Hold the lock of this name against other runs; says so when it has to wait."""
    with open(directory() / f"{name}.lock", "w", encoding="ascii") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("another run is busy with %s; waiting for it", name)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
