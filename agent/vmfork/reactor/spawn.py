# SPDX-License-Identifier: Apache-2.0
"""Starts one hook: own session, cwd "/", default signals, no descriptor but the three, and nothing inherited.

Stdin is a file of its own in memory, so that a hook that never reads, or closes it at once, costs the reactor nothing.
Stdout and stderr share one pipe. posix_spawn is used because fork would copy the reactor's page tables for each hook.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from vmfork.annotations import Protocol
from vmfork.paths import Paths
from vmfork.reactor.discovery import Hook

_OWN_DESCRIPTORS = Paths().processes + "/self/fd"
CATCHABLE = frozenset(int(number) for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP})
_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """What a hook is started with; the descriptors stay the caller's."""

    hook: Hook
    argument: str
    environment: Mapping[str, str]
    stdin: int
    output: int


class Starter(Protocol):
    """One way to start a hook: the id of its process, which leads a new session, or None if this way is not for it."""

    def start(self, launch: Launch) -> int | None: ...


class Spawn:
    """Runs the program at the path that was checked; OSError where the kernel refuses it."""

    def start(self, launch: Launch) -> int | None:
        hook = launch.hook
        return os.posix_spawn(
            hook.program or hook.path,
            [hook.path, launch.argument],
            launch.environment,
            file_actions=[
                (os.POSIX_SPAWN_DUP2, launch.stdin, 0),
                (os.POSIX_SPAWN_DUP2, launch.output, 1),
                (os.POSIX_SPAWN_DUP2, launch.output, 2),
            ],
            setsid=True,
            setsigmask=(),
            setsigdef=CATCHABLE,
        )


def start_with(starters: Sequence[Starter], launch: Launch) -> int:
    """The first way that takes the hook."""
    for starter in starters:
        pid = starter.start(launch)
        if pid is not None:
            return pid
    raise FileNotFoundError(f"no way to start {launch.hook.name}")


class Payload:
    """The bytes that every hook finds on its stdin, each at the beginning; a context manager."""

    def __init__(self, data: bytes) -> None:
        self._descriptor = os.memfd_create("vmfork-event", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        with open(self._descriptor, "wb", buffering=0, closefd=False) as file:
            file.write(data)
        fcntl.fcntl(self._descriptor, fcntl.F_ADD_SEALS, _SEALS)

    def open(self) -> int:
        """A new descriptor with an offset of its own; the caller closes it."""
        return os.open(f"{_OWN_DESCRIPTORS}/{self._descriptor}", os.O_RDONLY | os.O_CLOEXEC)

    def close(self) -> None:
        os.close(self._descriptor)


@contextlib.contextmanager
def surroundings() -> Iterator[None]:
    """What hooks inherit from the process that starts them: cwd "/", umask 022, no descriptor beyond 2."""
    for name in os.listdir(_OWN_DESCRIPTORS):
        # The descriptor of the listing itself is gone by now.
        with contextlib.suppress(OSError):
            if int(name) > 2:
                os.set_inheritable(int(name), False)  # noqa: FBT003 - it takes no keywords
    before = os.open(".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    umask = os.umask(0o022)
    try:
        os.chdir("/")
        yield
    finally:
        os.umask(umask)
        os.fchdir(before)
        os.close(before)
