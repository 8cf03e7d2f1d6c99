# SPDX-License-Identifier: Apache-2.0
"""One hook from its start to its result: running, told to end, killed, or waiting to be tried again.

The caller turns the event loop: it calls `on_exit`, `on_output` and `on_time`, and `stop` to end the hook early. All
times are CLOCK_MONOTONIC: the wall clock is stepped by a hook, and CLOCK_MONOTONIC does not run while a snapshot
lies on a disk, so a hook that was asleep in one keeps the rest of its time; where it leaps all the same, `postpone`
makes up for it. A hook that ended by itself may leave daemons behind; those that hold its pipe delay it by `DRAIN_SEC`
and then lose the pipe, not their life. A hook that the kernel refuses to start for lack of something is tried again
for as long as it might have run.
"""

from __future__ import annotations

import logging
import os
import selectors
import signal
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto

from vmfork import ids
from vmfork.model import HookOutcome, HookResult
from vmfork.reactor.descendants import Mark, Process, kill_newborn, kill_until_gone, read_process, send
from vmfork.reactor.discovery import Hook
from vmfork.reactor.output import Output, line_logger, warn_dropped
from vmfork.reactor.refusals import passes

log = logging.getLogger(__name__)

OK, TRY_AGAIN, SKIPPED = 0, 75, 77
MAX_TRIES = 3
DRAIN_SEC = 1.0
_POLL_SEC = 0.05
_KILL_POLL_SEC = 0.01
_KILL_BURST_SEC = 0.05
_GIVE_UP_SEC = 10.0


class Stage(Enum):
    """Where a hook is on its way."""

    RUNNING = auto()
    DRAINING = auto()
    ENDING = auto()
    KILLING = auto()
    PAUSED = auto()
    DONE = auto()


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How long one hook may run, how long it has after TERM, and whether exit code 75 means another try."""

    timeout_sec: float = 30.0
    kill_after_sec: float = 5.0
    retry_pause_sec: float = 0.5
    retries: bool = True


Find = Callable[[Mark], list[Process]]


class HookRun:
    """One hook. When `stage` is DONE it is closed and `result` is set; `reason` says why it could not be started."""

    def __init__(self, hook: Hook, limits: Limits, generation: int, selector: selectors.BaseSelector) -> None:
        self.hook = hook
        self.limits = limits
        self.stage = Stage.PAUSED
        self.deadline = 0.0
        self.process: Process | None = None
        self.mark: Mark | None = None
        self.result: HookResult | None = None
        self.reason: str | None = None
        self._generation = generation
        self._selector = selector
        self._sink = line_logger(hook.name, generation)
        self._pidfd: int | None = None
        self._output: Output | None = None
        self._tries = 0
        self._refusals = 0
        self._refused_since: float | None = None
        self._wake = 0.0
        self._began = 0.0
        self._stopped: HookOutcome | None = None
        self._code: int | None = None
        self._signal: int | None = None
        self._exited: float | None = None

    @property
    def wake(self) -> float:
        """When `on_time` wants to be called next."""
        return min(self.deadline, self._wake) if self.stage in (Stage.ENDING, Stage.KILLING) else self.deadline

    def start(self, launch: Callable[[int], int], mark: Callable[[int, int], Mark], now: float) -> None:
        """Begin a try: `launch(descriptor)` starts the process with that descriptor as its output.

        `mark(pid, pipe)` says how its processes are told from others.
        """
        self._began = self._began or now
        self._code = self._signal = self._exited = self.process = None
        try:
            self._launch(launch, mark)
        except OSError as error:
            self._refused(error, now)
            return
        self._tries += 1
        self._refused_since, self._refusals = None, 0
        self.stage, self.deadline = Stage.RUNNING, now + self.limits.timeout_sec

    def _launch(self, launch: Callable[[int], int], mark: Callable[[int, int], Mark]) -> None:
        reading, writing = os.pipe2(os.O_CLOEXEC)
        self._output = Output(reading, self._sink)
        try:
            pipe = os.fstat(reading).st_ino
            pid = launch(writing)
        finally:
            os.close(writing)
        self.mark = mark(pid, pipe)
        try:
            self._pidfd = os.pidfd_open(pid)
            self._selector.register(self._pidfd, selectors.EVENT_READ, (self, self.on_exit))
            self._selector.register(reading, selectors.EVENT_READ, (self, self.on_output))
            self.process = read_process(pid)
        except OSError:
            # Nobody would see its end, nor could end it in time.
            kill_newborn(pid)
            raise

    def postpone(self, seconds: float) -> None:
        """The clock counted so much that nobody lived through: it is taken off the deadline and off the duration."""
        if self.stage is not Stage.KILLING:
            # That ends in any case, even where a flood of processes makes every look late.
            self.deadline += seconds
        self._began += seconds if self._began else 0.0
        self._exited = None if self._exited is None else self._exited + seconds
        self._refused_since = None if self._refused_since is None else self._refused_since + seconds

    def on_exit(self, now: float) -> None:
        """The first process ended."""
        if self._pidfd is None:
            return
        info = os.waitid(os.P_PIDFD, self._pidfd, os.WEXITED)
        self._close_pidfd()
        self._exited = now
        if info is not None and info.si_code == os.CLD_EXITED:
            self._code = info.si_status
        elif info is not None:
            self._signal = info.si_status
        if self.stage is not Stage.RUNNING:
            self._wake = now
        elif self._open():
            self.stage, self.deadline = Stage.DRAINING, now + DRAIN_SEC
        else:
            self._finish(now)

    def on_output(self, now: float) -> None:
        """The pipe holds something, or its last writer let go of it."""
        if self._output is None or self._output.read():
            return
        self._close_output()
        if self.stage is Stage.DRAINING:
            self._finish(now)

    def on_time(self, now: float, find: Find) -> None:
        """The deadline, or the next look at what is left of the process tree, has come."""
        if self.stage is Stage.RUNNING:
            self.stop(HookOutcome.TIMEOUT, self.limits.kill_after_sec, now, find)
        elif self.stage is Stage.DRAINING:
            log.info("%s: a process that it left behind holds its output open", self.hook.name, extra=self._fields())
            self._finish(now)
        elif self.stage is Stage.ENDING:
            self._wake = now + _POLL_SEC
            if self._gone(find):
                self._finish(now)
            elif now >= self.deadline:
                self.stage, self.deadline = Stage.KILLING, now + _GIVE_UP_SEC
                self._kill(now, find)
        elif self.stage is Stage.KILLING:
            self._kill(now, find)

    def stop(self, outcome: HookOutcome, grace_sec: float, now: float, find: Find) -> None:
        """End the hook and all its descendants: TERM now, KILL after `grace_sec`; `outcome` is why."""
        if self.stage is Stage.PAUSED:
            self._stopped = outcome
            self._finish(now)
        elif self.stage in (Stage.RUNNING, Stage.ENDING):
            self._stopped = self._stopped or outcome
            for process in self._find(find):
                send(process, signal.SIGTERM)
            self.stage, self.deadline = Stage.ENDING, now + grace_sec
            self._wake = now + _KILL_POLL_SEC

    def _kill(self, now: float, find: Find) -> None:
        self._wake = now + _KILL_POLL_SEC
        # Several passes at once: what forks faster than one pass takes must not get a pause in between.
        left = kill_until_gone(lambda: self._find(find), seconds=_KILL_BURST_SEC)
        if self._pidfd is None and not left:
            self._finish(now)
        elif now >= self.deadline:
            pids = ", ".join(str(process.pid) for process in left)
            log.error("%s: cannot be killed: %s", self.hook.name, pids, extra=self._fields())
            self._finish(now)

    def _gone(self, find: Find) -> bool:
        return self._pidfd is None and not self._find(find)

    def _find(self, find: Find) -> list[Process]:
        return find(self.mark) if self.mark is not None else []

    def _open(self) -> bool:
        """Whether the pipe is still open after taking what is in it now."""
        for _ in range(4):
            if self._output is None or self._output.descriptor is None:
                return False
            if not self._output.read():
                self._close_output()
                return False
        return True

    def _close_output(self) -> None:
        if self._output is None or self._output.descriptor is None:
            return
        self._forget(self._output.descriptor)
        self._output.close()
        if self._output.dropped:
            warn_dropped(self.hook.name, self._generation, self._output.dropped)

    def _close_pidfd(self) -> None:
        if self._pidfd is not None:
            self._forget(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = None

    def _forget(self, descriptor: int) -> None:
        if self._selector.get_map() and descriptor in self._selector.get_map():
            self._selector.unregister(descriptor)

    def _refused(self, error: OSError, now: float) -> None:
        """It could not be started; what passes by itself is waited for as long as the hook might have taken."""
        # Not the hook's own word, so it takes none of the tries that 75 has, and is tried again in the early boot too.
        self._close_output()
        self._close_pidfd()
        since = self._refused_since = now if self._refused_since is None else self._refused_since
        self._refusals += 1
        if passes(error) and now - since < self.limits.timeout_sec:
            if self._refusals == 1:
                why = f"cannot be started now: {error.strerror}; it is tried again"
                log.warning("%s: %s", self.hook.name, why, extra=self._fields())
            self._pause(now, self._refusals)
            return
        hint = {8: ": does it begin with a #! line?", 2: ": is the interpreter of its #! line installed?"}
        self.reason = f"cannot be started: {error.strerror}{hint.get(error.errno or 0, '')}"
        self._exited = now
        self._finish(now)

    def _pause(self, now: float, times: int) -> None:
        self.stage, self.deadline = Stage.PAUSED, now + self.limits.retry_pause_sec * times

    def _finish(self, now: float) -> None:
        self._close_output()
        self._close_pidfd()
        again = self._code == TRY_AGAIN and self._stopped is None and self.limits.retries
        if again and self._tries < MAX_TRIES:
            self._pause(now, self._tries)
            return
        self.stage = Stage.DONE
        self.result = HookResult(
            name=self.hook.name,
            path=self.hook.path,
            result=self._outcome(),
            exit_code=self._code,
            signal=self._signal,
            duration_ms=round(((self._exited or now) - self._began) * 1000) if self._began else None,
        )

    def _outcome(self) -> HookOutcome:
        if self._stopped is not None:
            return self._stopped
        return {OK: HookOutcome.OK, SKIPPED: HookOutcome.SKIPPED}.get(
            -1 if self._code is None else self._code, HookOutcome.FAILED
        )

    def _fields(self) -> dict[str, object]:
        return {
            "MESSAGE_ID": ids.HOOK_LEFT_PROCESSES,
            "VMFORK_HOOK": self.hook.name,
            "VMFORK_GENERATION": self._generation,
        }
