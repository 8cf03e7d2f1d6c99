# SPDX-License-Identifier: Apache-2.0
"""Runs all hooks of one occasion: equal NN side by side, the next NN when all of them ended, none stopped by another.

One thread, one selector. `interrupt` may be called from a signal handler or by the reporter: the running hooks are
ended with all their descendants and reported as interrupted, and nothing more is started. Nothing here knows where
reports go or what a hook does.
"""

from __future__ import annotations

import contextlib
import logging
import os
import selectors
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType

from vmfork import ids
from vmfork.annotations import Protocol, Self
from vmfork.model import EventState, HookOutcome, HookResult
from vmfork.reactor import descendants
from vmfork.reactor.descendants import Mark, Process
from vmfork.reactor.discovery import Hook
from vmfork.reactor.environment import environment_of
from vmfork.reactor.orphans import Orphans
from vmfork.reactor.phases import Occasion, in_order
from vmfork.reactor.process import HookRun, Limits, Stage
from vmfork.reactor.spawn import Launch, Payload, Spawn, Starter, start_with, surroundings

log = logging.getLogger(__name__)

MAX_PARALLEL = 128
_INTERRUPT_GRACE_SEC = 0.5
# A guest that was paused and goes on finds that CLOCK_MONOTONIC counted on where its clocksource is the bare TSC. So
# much more between two looks at it than was waited for is such a pause. No wait is long, so that a pause costs a hook
# a second at most, and a machine that is always late still comes to every deadline.
_LEAP_SEC = 2.0
_LONGEST_WAIT_SEC = 1.0
_CLOCK_NOISE_NS = 10_000_000
_BAD = {HookOutcome.FAILED, HookOutcome.TIMEOUT, HookOutcome.INTERRUPTED, HookOutcome.UNTRUSTED}
_MESSAGES = {
    HookOutcome.FAILED: ids.HOOK_FAILED,
    HookOutcome.TIMEOUT: ids.HOOK_TIMED_OUT,
    HookOutcome.UNTRUSTED: ids.HOOK_UNTRUSTED,
}


class Reporter(Protocol):
    """Where the course of a reaction goes."""

    def started(self, hook: Hook) -> None: ...
    def ended(self, result: HookResult) -> None: ...
    def finished(self, state: EventState, clock_step_ns: int | None) -> None: ...


class Records(Protocol):
    """What the next reactor must know of a hook that runs, should this one be killed."""

    def begins(self, hook: str, token: str | None) -> None: ...
    def runs(self, hook: str, token: str | None, process: Process) -> None: ...
    def ended(self, hook: str) -> None: ...


class Engine:
    """One run of the hooks; a context manager. `limits_of(name)` are the bounds of one hook.

    `starters` are tried in order for each hook; exec takes what they leave.
    """

    def __init__(
        self,
        occasion: Occasion,
        limits_of: Callable[[str], Limits],
        reporter: Reporter,
        *,
        records: Records | None = None,
        starters: Sequence[Starter] = (),
    ) -> None:
        self.interrupted = False
        self._occasion = occasion
        self._generation = occasion.generation
        self._limits_of = limits_of
        self._reporter = reporter
        self._records = records
        self._starters = (*starters, Spawn())
        self._token = occasion.event.token.hex() if occasion.event else None
        self._selector = selectors.DefaultSelector()
        self._payload = Payload(occasion.payload())
        self._woken, self.wakeup = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._selector.register(self._woken, selectors.EVENT_READ, None)
        self._runs: list[HookRun] = []
        self._orphans = Orphans(lambda: {run.mark.pid for run in self._runs if run.mark is not None})
        self._failed = False
        self._looked = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._selector.close()
        self._payload.close()
        os.close(self._woken)
        os.close(self.wakeup)

    def interrupt(self) -> None:
        """End the run soon. A signal handler needs `signal.set_wakeup_fd(engine.wakeup)` to be noticed at once."""
        self.interrupted = True
        with contextlib.suppress(BlockingIOError):
            os.write(self.wakeup, b"!")

    def run(self, hooks: Iterable[Hook], finished: Iterable[HookResult] = ()) -> EventState:
        """Run every hook that is not in `finished` as ok; superseded when interrupted, then nothing is `finished`."""
        done = {result.name for result in finished if result.result is HookOutcome.OK}
        hooks = [hook for hook in hooks if hook.name not in done]
        descendants.become_subreaper()
        offset = _clock_offset()
        with surroundings():
            for hook in hooks:
                if hook.state is not None:
                    self._report(HookResult(name=hook.name, path=hook.path, result=hook.state), hook.reason)
            for group in in_order((hook for hook in hooks if hook.enabled), self._occasion.phase):
                if not self.interrupted:
                    self._run_group(group)
        if self.interrupted:
            return EventState.SUPERSEDED
        state = EventState.FAILED if self._failed else EventState.SETTLED
        step = _clock_offset() - offset
        self._reporter.finished(state, step if abs(step) >= _CLOCK_NOISE_NS else None)
        return state

    def _run_group(self, group: Sequence[Hook]) -> None:
        waiting = deque(group)
        self._orphans.begin(alone=len(group) == 1)
        try:
            while waiting or self._runs:
                if self.interrupted:
                    waiting.clear()
                    self._stop_all()
                if not waiting or len(self._runs) >= MAX_PARALLEL:
                    self._turn(None)
                    continue
                self._begin(waiting.popleft())
                # Hooks end while others are being started; their pipes must not fill up meanwhile. This may take an
                # interruption's word out of the pipe: whether there was one is looked at before anything waits.
                self._turn(0.0)
        finally:
            self._abandon()
        self._orphans.report({hook.name: self._mark(hook.name, -1) for hook in group}, generation=self._generation)

    def _begin(self, hook: Hook) -> None:
        self._reporter.started(hook)
        run = HookRun(hook, self._limits_of(hook.name), self._generation, self._selector)
        self._runs.append(run)
        # The report may have brought the news of a newer fork: this hook is its first victim then.
        if not self.interrupted:
            self._start(run)

    def _turn(self, timeout: float | None) -> None:
        """Wait for the next event or deadline, at most `timeout` seconds, and act on all that are due."""
        if timeout is None and self._runs:
            timeout = max(0.0, min(run.wake for run in self._runs) - time.monotonic())
            if any(run.stage is Stage.DONE for run in self._runs):
                timeout = 0.0
        elif timeout is None:
            return
        timeout = min(timeout, _LONGEST_WAIT_SEC)
        events = self._selector.select(timeout)
        now = self._look(timeout)
        for key, _ in events:
            if key.data is None:
                with contextlib.suppress(BlockingIOError):
                    os.read(self._woken, 4096)
                continue
            run, act = key.data
            if run.stage is not Stage.DONE:
                act(now)
        for run in [run for run in self._runs if run.stage is not Stage.DONE and run.wake <= now]:
            if run.stage is Stage.PAUSED and self.interrupted:
                run.stop(HookOutcome.INTERRUPTED, 0.0, now, self._orphans.family)
            elif run.stage is Stage.PAUSED:
                self._start(run)
            else:
                run.on_time(now, self._orphans.family)
        self._collect()

    def _look(self, waited: float = 0.0) -> float:
        """The time. What passed since the last look, far more than the wait in between, is charged to no hook."""
        now = time.monotonic()
        late, self._looked = now - self._looked - waited, now
        if late > _LEAP_SEC and self._runs:
            log.info("the clock leapt by %d s while hooks ran; they have so much longer", late)
            for run in self._runs:
                run.postpone(late)
        return now

    def _start(self, run: HookRun) -> None:
        hook = run.hook
        if self._records is not None:
            self._records.begins(hook.name, self._token)
        environment = environment_of(self._occasion, hook.name, deadline_sec=run.limits.timeout_sec)

        def launch(output: int) -> int:
            stdin = self._payload.open()
            try:
                argument = self._occasion.phase.value
                wanted = Launch(hook=hook, argument=argument, environment=environment, stdin=stdin, output=output)
                return start_with(self._starters, wanted)
            finally:
                os.close(stdin)

        run.start(launch, lambda pid, pipe: self._mark(hook.name, pid, pipe), self._look())
        if self._records is not None and run.process is not None:
            self._records.runs(hook.name, self._token, run.process)

    def _collect(self) -> None:
        for run in [run for run in self._runs if run.stage is Stage.DONE]:
            self._runs.remove(run)
            if self._records is not None:
                self._records.ended(run.hook.name)
            if run.result is not None:
                self._report(run.result, run.reason)

    def _report(self, result: HookResult, reason: str | None) -> None:
        self._failed = self._failed or result.result in _BAD
        fields: dict[str, object] = {"VMFORK_HOOK": result.name, "VMFORK_GENERATION": self._generation}
        message = _MESSAGES.get(result.result)
        if message is None:
            log.debug("%s: %s", result.name, result.result, extra=fields)
        else:
            fields["MESSAGE_ID"] = message
            log.error("%s: %s", result.name, reason or _how(result), extra=fields)
        self._reporter.ended(result)

    def _stop_all(self) -> None:
        now = self._look()
        for run in self._runs:
            if run.stage in (Stage.RUNNING, Stage.PAUSED) or (
                run.stage is Stage.ENDING and run.deadline > now + _INTERRUPT_GRACE_SEC
            ):
                run.stop(HookOutcome.INTERRUPTED, _INTERRUPT_GRACE_SEC, now, self._orphans.family)
        self._collect()

    def _abandon(self) -> None:
        """Something raised in the middle of a group: no hook may outlive the engine that would have ended it."""
        for run in self._runs:
            if run.mark is not None:
                mark = run.mark
                descendants.kill_until_gone(lambda mark=mark: self._orphans.family(mark), seconds=1.0)  # type: ignore[misc]
        self._runs.clear()

    def _mark(self, name: str, pid: int, pipe: int | None = None) -> Mark:
        return Mark(pid=pid, name=name, token=self._token, root=self._occasion.root, pipe=pipe)


def _how(result: HookResult) -> str:
    if result.result is HookOutcome.TIMEOUT:
        return "did not end in time and was ended with all its processes"
    if result.signal is not None:
        return f"failed: killed by signal {result.signal}"
    return "failed" if result.exit_code is None else f"failed with exit code {result.exit_code}"


def _clock_offset() -> int:
    """CLOCK_REALTIME less CLOCK_BOOTTIME in ns: it changes when somebody steps the wall clock, and only then."""
    before = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    wall = time.clock_gettime_ns(time.CLOCK_REALTIME)
    return wall - (before + time.clock_gettime_ns(time.CLOCK_BOOTTIME)) // 2
