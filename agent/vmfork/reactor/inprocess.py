# SPDX-License-Identifier: Apache-2.0
"""Runs an unmodified shipped hook by os.fork() without exec: the same contract, less one start of Python each.

Only a hook of the package's own directory whose whole text is the known call of `vmforkctl action NAME` is taken; it
gets the environment, session, pipes and exit codes that the script would have got. Everything else is left to exec.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import re
import signal
import sys
from collections.abc import Callable, Mapping, Sequence

from vmfork.annotations import NoReturn, Protocol
from vmfork.reactor import descendants
from vmfork.reactor.discovery import Hook, Origin
from vmfork.reactor.spawn import CATCHABLE, Launch

_SHORT_FORM = re.compile(rb'#!/bin/sh\n(?:#[^\n]*\n)*exec vmforkctl action ([a-z][a-z0-9-]*) "\$@"\n')
_MAX_SIZE = 1024


class RunAction(Protocol):
    """Runs one action as `vmforkctl action NAME ARGV...` does, and returns its exit code; `settings` are its keys."""

    def __call__(self, name: str, argv: Sequence[str], settings: Mapping[str, str]) -> int: ...


def run_action(name: str, argv: Sequence[str], settings: Mapping[str, str]) -> int:
    """The package's own actions, imported when the first one is wanted."""
    from vmfork import actions

    return actions.main(name, argv, settings=settings)


def action_of(hook: Hook) -> str | None:
    """The action that an unmodified shipped hook calls, None for every other hook."""
    if hook.origin is not Origin.LIB or not hook.enabled:
        return None
    try:
        with open(hook.program, "rb", buffering=0) as file:
            match = _SHORT_FORM.fullmatch(file.read(_MAX_SIZE))
    except OSError:
        return None
    return None if match is None else match[1].decode()


class InProcess:
    """Starts shipped hooks in a fork of this process. `settings(hook)` are the hook's own keys of the configuration."""

    def __init__(self, settings: Callable[[str], Mapping[str, str]], run: RunAction = run_action) -> None:
        self._settings = settings
        self._run = run

    def start(self, launch: Launch) -> int | None:
        action = action_of(launch.hook)
        if action is None:
            return None
        parent = os.getpid()
        # Until the child has put off the reactor's handlers, a signal to it would be taken for one to the reactor.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            pid = os.fork()
            if pid == 0:
                self._child(action, launch, parent)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if self._run is run_action:
            # While the first child imports them for itself, for all that follow. For lack of memory or descriptors it
            # may fail; the child runs already, and must not be lost to whoever is to watch it.
            with contextlib.suppress(ImportError, OSError, MemoryError):
                importlib.import_module("vmfork.actions")
        return pid

    def _child(self, action: str, launch: Launch, parent: int) -> NoReturn:
        code = 1
        try:
            _become_hook(launch)
            if descendants.die_with(parent, signal.SIGKILL):
                code = self._run(action, (launch.argument,), self._settings(launch.hook.name))
            sys.stdout.flush()
        except BaseException as error:
            # The edge of a process: whatever an action raises must end here and not run on as a second reactor.
            os.write(2, f"{action}: {type(error).__name__}: {error}\n".encode(errors="backslashreplace"))
        finally:
            os._exit(code)


def _become_hook(launch: Launch) -> None:
    os.setsid()
    os.dup2(launch.stdin, 0)
    os.dup2(launch.output, 1)
    os.dup2(launch.output, 2)
    # Before anything else: a copy of the reactor's lock would outlive the reactor.
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))
    signal.set_wakeup_fd(-1)
    for number in CATCHABLE:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    os.environ.clear()
    os.environ.update(launch.environment)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115 - it lives as long as the process
    sys.stdout = open(1, "w", buffering=1, closefd=False, errors="backslashreplace")  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False, errors="backslashreplace")  # noqa: SIM115
    log = logging.getLogger("vmfork")
    log.handlers[:] = [logging.StreamHandler(sys.stderr)]
