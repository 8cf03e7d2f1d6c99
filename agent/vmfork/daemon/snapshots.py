# SPDX-License-Identifier: Apache-2.0
"""Before a snapshot and after it: tell the subscribers, run the hooks, undo it all if no fork follows.

In a clone the after-fork hooks undo what was prepared, so a fork ends the preparation. In the guest that goes on,
`vmforkctl resume` does, or the deadline, should whoever asked for it be gone.
"""

from __future__ import annotations

import logging
import os

from vmfork import ids
from vmfork.daemon.ledger import Ledger
from vmfork.daemon.loop import Deadline, Loop
from vmfork.daemon.reaction import Job, Phase, Reaction
from vmfork.daemon.subscribers import AFTER_SNAPSHOT, BEFORE_SNAPSHOT, Subscribers
from vmfork.daemon.templatemark import TemplateMark
from vmfork.errors import VmforkError
from vmfork.jsonfields import JsonValue
from vmfork.model import EventState
from vmfork.varlink.server import Call

log = logging.getLogger(__name__)


class Snapshots:
    """At most one preparation at a time; the callers of Prepare and Resume are answered when their hooks ended."""

    def __init__(
        self, loop: Loop, ledger: Ledger, mark: TemplateMark, reaction: Reaction, subscribers: Subscribers
    ) -> None:
        self._loop = loop
        self._ledger = ledger
        self._mark = mark
        self._reaction = reaction
        self._subscribers = subscribers
        self.number = 0
        self._is_prepared = False
        self._call: Call | None = None
        self._deadline: Deadline | None = None
        self._undo: Deadline | None = None

    def prepare(self, call: Call, *, template: bool, ack_sec: float, deadline_sec: float) -> None:
        """Tell the subscribers; when they are ready, or `ack_sec` is over, run the hooks of before-snapshot."""
        if self._reaction.job is not None:
            raise VmforkError("a reaction is still going on", hint="vmforkctl wait --settled, then prepare again")
        if template:
            self._mark.leave()
        self.number += 1
        self._call = call
        self._is_prepared = True
        log.info(
            "preparing for a snapshot%s",
            ": this guest is a template, its clones get an identity of their own" if template else "",
            extra={"MESSAGE_ID": ids.SNAPSHOT_PREPARED},
        )
        self._subscribers.tell(BEFORE_SNAPSHOT, self._ledger.generation, snapshot=self.number)
        self._deadline = self._loop.after(ack_sec, self._run_hooks)
        self._undo = self._loop.after(ack_sec + deadline_sec, self._undo_by_itself)
        self.look()

    def look(self) -> None:
        """A subscriber became ready, or went away."""
        if self._deadline is not None and not self._subscribers.not_ready(self.number):
            self._run_hooks()

    def _run_hooks(self) -> None:
        self._cancel_deadline()
        not_ready: list[JsonValue] = [one.to_json() for one in self._subscribers.not_ready(self.number)]
        self._run(Phase.BEFORE_SNAPSHOT, {"snapshot": self.number, "not_ready": not_ready})

    def resume(self, call: Call) -> None:
        """The snapshot was taken, or called off: run the hooks of after-snapshot."""
        if not self._is_prepared:
            call.error("io.vmfork.NotPrepared")
            return
        self._call = call
        log.info("the preparation for a snapshot is undone", extra={"MESSAGE_ID": ids.SNAPSHOT_CALLED_OFF})
        self._finish()

    def _undo_by_itself(self) -> None:
        log.warning(
            "prepared for a snapshot, but neither a fork nor vmforkctl resume followed: undone",
            extra={"MESSAGE_ID": ids.SNAPSHOT_CALLED_OFF},
        )
        self._finish()

    def _finish(self) -> None:
        self.forget()
        self._mark.remove()
        self._subscribers.tell(AFTER_SNAPSHOT, self._ledger.generation, snapshot=self.number)
        self._run(Phase.AFTER_SNAPSHOT, {})

    def forget(self) -> None:
        """A fork happened, or the preparation was undone: nothing is prepared any more."""
        self._is_prepared = False
        self._cancel_deadline()
        if self._undo is not None:
            self._undo.cancel()
            self._undo = None

    def superseded(self) -> None:
        """This is a clone: whoever asked for the preparation asked it of the original."""
        self.forget()
        call, self._call = self._call, None
        if call is not None and not call.finished:
            call.error("io.vmfork.Superseded")

    def _cancel_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _run(self, phase: Phase, answer: dict[str, JsonValue]) -> None:
        def ended(job: Job, _outcome: EventState, _step: int | None) -> None:
            call, self._call = self._call, None
            if call is not None and not call.finished:
                hooks: list[JsonValue] = [result.to_json() for result in job.finished.values()]
                call.reply({**answer, "hooks": hooks})

        self._reaction.run(
            Job(
                phase=phase,
                token=os.urandom(16).hex(),
                event=self._ledger.event,
                ended=ended,
                hook_ended=lambda _result: None,
            )
        )
