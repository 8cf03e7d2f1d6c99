# SPDX-License-Identifier: Apache-2.0
"""Starts the reactor: as a unit of its own under systemd, else as a child that ends with the daemon.

`restart`, not `start`: a start job for a unit that is still activating is merged into the running one, and the newer
fork would be dropped. Hooks must not inherit the detector's sandbox, which only a unit of their own can give them.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Callable

from vmfork import sysd
from vmfork.daemon.descriptors import limit_for_children
from vmfork.daemon.loop import Deadline, Loop
from vmfork.paths import Paths

log = logging.getLogger(__name__)

UNIT = "vmfork-react.service"
_TERMINATION_SEC = 6.0


class ReactorProcess:
    """At most one child; `ended` is called when it exits by itself, or cannot be started.

    `problem` is the sentence that says why the last one could not be started, until one is.
    """

    def __init__(self, loop: Loop, paths: Paths, *, as_unit: bool, ended: Callable[[], None]) -> None:
        self._loop = loop
        self._paths = paths
        self._as_unit = as_unit
        self._ended = ended
        self.problem: str | None = None
        self._child: tuple[int, int] | None = None
        self._killer: Deadline | None = None
        self._start_again = False

    def start(self) -> None:
        """Run the reactor from its beginning; one that still runs is ended first."""
        if self._as_unit:
            self._spawn(["systemctl", "restart", "--no-block", UNIT])
        elif self._child is None:
            self._spawn(self._command())
        else:
            self._start_again = True
            self.stop()

    def stop(self) -> None:
        """Ask a running child to end, and kill it if it does not."""
        if self._child is None or self._as_unit:
            return
        self._signal(signal.SIGTERM)
        if self._killer is None:
            self._killer = self._loop.after(_TERMINATION_SEC, lambda: self._signal(signal.SIGKILL))

    def _command(self) -> list[str]:
        isolated = ["-I"] if sys.flags.isolated else []
        root = ["--root", self._paths.root] if self._paths.is_fake else []
        return [sys.executable, *isolated, "-m", "vmfork", *root, "react", "--parent", str(os.getpid())]

    def _spawn(self, command: list[str]) -> None:
        if self._child is not None:
            # A systemctl that has not returned yet: it was told of an older fork, the restart it asked for is queued.
            self._start_again = True
            return
        try:
            with limit_for_children():
                pid = os.posix_spawnp(command[0], command, os.environ, setsigmask=[], setsigdef=[signal.SIGPIPE])
            self._child = pid, self._watched(pid)
        except OSError as error:
            self._refused(f"{command[0]}: {error.strerror}")
            self._loop.after(0, self._ended)
            return
        if not self._as_unit:
            self.problem = None

    def _watched(self, pid: int) -> int:
        """A descriptor of the child, watched by the loop; a child whose end nobody would see is ended at once."""
        try:
            descriptor = os.pidfd_open(pid)
            try:
                self._loop.watch(descriptor, self._reap)
            except OSError:
                os.close(descriptor)
                raise
        except OSError:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise
        return descriptor

    def _refused(self, why: str) -> None:
        self.problem = f"the reactor cannot be started: {why}"
        log.error("%s", self.problem)

    def _signal(self, number: int) -> None:
        if self._child is not None:
            signal.pidfd_send_signal(self._child[1], number)

    def _reap(self) -> None:
        if self._child is None:
            return
        pid, descriptor = self._child
        _, status = os.waitpid(pid, 0)
        self._loop.forget(descriptor)
        os.close(descriptor)
        self._child = None
        if self._killer is not None:
            self._killer.cancel()
            self._killer = None
        code = os.waitstatus_to_exitcode(status)
        if self._as_unit and code != 0:
            self._refused(f"systemctl restart {UNIT} ended with exit status {code}")
        elif self._as_unit:
            self.problem = None
        if self._start_again:
            self._start_again = False
            self.start()
        elif not self._as_unit or code != 0:
            self._ended()

    def abandon(self) -> None:
        """The daemon ends: so does its child; a unit goes on and is told by its closed connection."""
        if not self._as_unit:
            self._signal(signal.SIGTERM)


def may_use_units(paths: Paths) -> bool:
    """True where the unit is there to be restarted."""
    directories = ("/etc/systemd/system", "/run/systemd/system", "/usr/lib/systemd/system", "/lib/systemd/system")
    return sysd.booted(paths) and any(os.path.exists(f"{directory}/{UNIT}") for directory in directories)
