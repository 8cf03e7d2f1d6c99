# SPDX-License-Identifier: Apache-2.0
"""The reaction as the daemon sees it: one job at a time, always for the newest fork, until a result is in.

A job is handed to whichever reactor process asks for it over the admin socket. A connection that ends without a result
means that the reactor died: it is run again, with growing pauses. A newer job makes the reports of the older one be
answered with Superseded, which ends that reactor.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum

from vmfork import ids
from vmfork.daemon.loop import Deadline, Loop
from vmfork.daemon.reactorprocess import ReactorProcess
from vmfork.jsonfields import Fields
from vmfork.model import EventState, ForkEvent, HookOutcome, HookResult
from vmfork.varlink.server import Call, Caller

log = logging.getLogger(__name__)

# A reactor that has not asked for its job by then will never do: it could not even be started.
_PATIENCE_SEC = 30.0
_PAUSES_SEC = (0.2, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)


class Phase(StrEnum):
    """What the hooks are run for; the first argument of every hook."""

    AFTER_FORK = "after-fork"
    BEFORE_SNAPSHOT = "before-snapshot"
    AFTER_SNAPSHOT = "after-snapshot"


@dataclass(slots=True, kw_only=True)
class Job:
    """One run of the hooks; `ended` gets its outcome. `finished` and `running` follow the reactor's reports."""

    phase: Phase
    token: str
    event: ForkEvent | None
    ended: Callable[[Job, EventState, int | None], None]
    hook_ended: Callable[[HookResult], None]
    finished: dict[str, HookResult] = field(default_factory=dict)
    running: dict[str, str] = field(default_factory=dict)

    def interrupted(self) -> list[HookResult]:
        """The hooks that began and never reported an end."""
        return [HookResult(name=name, path=path, result=HookOutcome.INTERRUPTED) for name, path in self.running.items()]


class Reaction:
    """Runs the newest job; an older one is dropped the moment a newer one begins."""

    def __init__(self, loop: Loop, process: Callable[[Callable[[], None]], ReactorProcess], *, early: bool) -> None:
        self._loop = loop
        self._process = process(self._reactor_ended)
        self._early = early
        self._job: Job | None = None
        self._connection: Caller | None = None
        self._failures = 0
        self._retry: Deadline | None = None
        self._overdue: Deadline | None = None

    @property
    def job(self) -> Job | None:
        """What is being run now, or waits to be run again."""
        return self._job

    @property
    def problems(self) -> list[str]:
        """What keeps the job from its end, as sentences for `status`; empty while nothing does."""
        if self._job is None:
            return []
        if self._process.problem is not None:
            return [self._process.problem]
        if self._failures == 0:
            return []
        tries = "one try" if self._failures == 1 else f"{self._failures} tries"
        return [f"the reaction has no result after {tries} and is begun again: journalctl -t vmfork-react says why"]

    def run(self, job: Job) -> None:
        """Begin a job in place of whatever was going on."""
        self._job = job
        self._connection = None
        self._failures = 0
        self._start()

    def _start(self) -> None:
        self._cancel_retry()
        self._process.start()
        self._overdue = self._loop.after(_PATIENCE_SEC, self._try_again)

    def stop(self) -> None:
        """The daemon ends."""
        self._cancel_retry()
        self._process.abandon()

    def _cancel_retry(self) -> None:
        for deadline in (self._retry, self._overdue):
            if deadline is not None:
                deadline.cancel()
        self._retry = self._overdue = None

    # What the reactor says. Each handler answers its call.

    def begin(self, call: Call) -> None:
        job = self._job
        if job is None:
            call.error("io.vmfork.NothingToDo")
            return
        if self._connection is not None and not self._connection.closed:
            # The lock of the reactors makes this a reactor that was replaced and does not know it yet.
            log.info("a second reactor takes over from the first")
        self._cancel_retry()
        self._connection = call.connection
        call.connection.on_close = lambda: self._connection_ended(call.connection)
        job.running.clear()
        call.reply(
            {
                "phase": job.phase.value,
                "token": job.token,
                "event": None if job.event is None else job.event.to_json(with_ids=True),
                "finished": [result.to_json() for result in job.finished.values()],
                "early": self._early,
            }
        )

    def report(self, call: Call) -> None:
        job = self._current_job(call)
        if job is None:
            return
        name, path = call.parameters.text("name"), call.parameters.text("path")
        if "result" in call.parameters:
            result = HookResult.from_json(Fields(dict(call.values), "ReportHook"))
            job.running.pop(name, None)
            job.finished[name] = result
            job.hook_ended(result)
        else:
            job.running[name] = path
        call.reply()

    def end(self, call: Call) -> None:
        job = self._current_job(call)
        if job is None:
            return
        outcome = call.parameters.choice("state", EventState)
        step = call.parameters.integer_or_none("clock_step_ns", minimum=-(2**63), maximum=2**63 - 1)
        self._job = None
        self._connection = None
        call.reply()
        job.ended(job, outcome, step)

    def put_off(self, call: Call) -> None:
        """All that can be done for now is done: the job is not ended, but nobody waits for its result any more."""
        if self._current_job(call) is not None:
            self._job = None
            self._connection = None
            call.reply()

    def _current_job(self, call: Call) -> Job | None:
        job = self._job
        if job is None or call.parameters.text("token") != job.token or call.connection is not self._connection:
            call.error("io.vmfork.Superseded")
            return None
        return job

    # A reactor that ended without a result.

    def _connection_ended(self, connection: Caller) -> None:
        if connection is self._connection:
            self._connection = None
            self._try_again()

    def _reactor_ended(self) -> None:
        self._try_again()

    def _try_again(self) -> None:
        if self._job is None or self._retry is not None or self._connection is not None:
            return
        pause = _PAUSES_SEC[min(self._failures, len(_PAUSES_SEC) - 1)]
        self._failures += 1
        log.warning(
            "the reactor ended without a result; it is run again in %g s",
            pause,
            extra={"MESSAGE_ID": ids.REACTION_FAILED},
        )
        self._retry = self._loop.after(pause, self._run_again)

    def _run_again(self) -> None:
        self._retry = None
        if self._job is not None and self._connection is None:
            self._start()
