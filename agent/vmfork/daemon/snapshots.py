# SPDX-License-Identifier: Apache-2.0
"""Before a snapshot and after it: tell the subscribers, run the hooks, undo it all if no fork follows.

In a clone the after-fork hooks undo what was prepared, so a fork ends the preparation. In the guest that goes on,
`vmforkctl resume` does, or the deadline, should whoever asked for it be gone. What is still to be undone is in the
memory in /run before anything is prepared, and until the hooks of after-snapshot ended: the daemon may be killed or
replaced in between.
"""

from __future__ import annotations

import logging
import os
import time
from dataclasses import replace

from vmfork import ids
from vmfork.daemon.ledger import Ledger
from vmfork.daemon.loop import Deadline, Loop
from vmfork.daemon.reaction import Job, Phase, Reaction
from vmfork.daemon.subscribers import AFTER_SNAPSHOT, BEFORE_SNAPSHOT, Subscribers
from vmfork.daemon.templatemark import TemplateMark
from vmfork.errors import VmforkError
from vmfork.jsonfields import JsonValue
from vmfork.model import EventState
from vmfork.state import Preparation
from vmfork.varlink.server import Call

log = logging.getLogger(__name__)

# Both parts of a deadline are at most a day. A file may say more, and select refuses what is far too long.
_LONGEST_SEC = 2 * 86_400.0


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
        self._calls: list[Call] = []
        self._ready: Deadline | None = None
        self._undo: Deadline | None = None

    @property
    def number(self) -> int:
        """The snapshot that was prepared last, or is being prepared."""
        return self._ledger.remembered.snapshot

    def take_up(self) -> None:
        """After a start of the daemon: undo what the last one prepared, when it is due."""
        preparation = self._ledger.remembered.preparation
        if preparation is None:
            return
        if preparation.undoing:
            self._finish(preparation)
        else:
            self._set_undo(preparation)

    def prepare(self, call: Call, *, template: bool, ack_sec: float, deadline_sec: float) -> None:
        """Tell the subscribers; when they are ready, or `ack_sec` is over, run the hooks of before-snapshot."""
        if self._reaction.job is not None or not self._ledger.remembered.handled:
            raise VmforkError("a reaction is still going on", hint="vmforkctl wait --settled, then prepare again")
        if self._calls:
            raise VmforkError("another snapshot is being prepared", hint="wait for it, or call vmforkctl resume")
        before = self._ledger.remembered.preparation
        undo_at_ns = time.monotonic_ns() + round((ack_sec + deadline_sec) * 1e9)
        preparation = Preparation(undo_at_ns=undo_at_ns)
        self._ledger.note(preparation=preparation, snapshot=self.number + 1)
        if template:
            try:
                self._mark.leave()
            except VmforkError:
                self._ledger.note(preparation=before)
                raise
        self._calls.append(call)
        log.info(
            "preparing for a snapshot%s",
            ": this guest is a template, its clones get an identity of their own" if template else "",
            extra={"MESSAGE_ID": ids.SNAPSHOT_PREPARED},
        )
        self._subscribers.tell(BEFORE_SNAPSHOT, self._ledger.generation, snapshot=self.number)
        self._set_undo(preparation)
        self._ready = self._loop.after(ack_sec, self._run_hooks)
        self.look()

    def look(self) -> None:
        """A subscriber became ready, or went away."""
        if self._ready is not None and not self._subscribers.not_ready(self.number):
            self._run_hooks()

    def _run_hooks(self) -> None:
        self._forget_ready()
        not_ready: list[JsonValue] = [one.to_json() for one in self._subscribers.not_ready(self.number)]
        self._run(Phase.BEFORE_SNAPSHOT, {"snapshot": self.number, "not_ready": not_ready})

    def resume(self, call: Call) -> None:
        """The snapshot was taken, or called off: run the hooks of after-snapshot."""
        preparation = self._ledger.remembered.preparation
        if preparation is None:
            call.error("io.vmfork.NotPrepared")
            return
        if not preparation.undoing:
            log.info("the preparation for a snapshot is undone", extra={"MESSAGE_ID": ids.SNAPSHOT_CALLED_OFF})
            self._finish(preparation)
        self._calls.append(call)

    def _undo_by_itself(self) -> None:
        preparation = self._ledger.remembered.preparation
        if preparation is not None:
            log.warning(
                "prepared for a snapshot, but neither a fork nor vmforkctl resume followed: undone",
                extra={"MESSAGE_ID": ids.SNAPSHOT_CALLED_OFF},
            )
            self._finish(preparation)

    def _finish(self, preparation: Preparation) -> None:
        # Whoever still waits for Prepare waits for hooks that will not end any more.
        self.superseded()
        self._ledger.note(preparation=replace(preparation, undoing=True))
        self._mark.remove()
        self._subscribers.tell(AFTER_SNAPSHOT, self._ledger.generation, snapshot=self.number)
        self._run(Phase.AFTER_SNAPSHOT, {})

    def superseded(self) -> None:
        """What is prepared is prepared no more: it is being undone, or this is a clone, of which nobody asked it."""
        self._forget_ready()
        if self._undo is not None:
            self._undo.cancel()
            self._undo = None
        for call in self._answered():
            call.error("io.vmfork.Superseded")

    def _answered(self) -> list[Call]:
        """Who waits for an answer; from now on nobody does."""
        calls, self._calls = self._calls, []
        return [call for call in calls if not call.finished]

    def _set_undo(self, preparation: Preparation) -> None:
        if self._undo is not None:
            self._undo.cancel()
        rest_sec = (preparation.undo_at_ns - time.monotonic_ns()) / 1e9
        self._undo = self._loop.after(min(rest_sec, _LONGEST_SEC), self._undo_by_itself)

    def _forget_ready(self) -> None:
        if self._ready is not None:
            self._ready.cancel()
            self._ready = None

    def _run(self, phase: Phase, answer: dict[str, JsonValue]) -> None:
        def ended(job: Job, _outcome: EventState, _step: int | None) -> None:
            if phase is Phase.AFTER_SNAPSHOT:
                self._ledger.note(preparation=None)
            hooks: list[JsonValue] = [result.to_json() for result in job.finished.values()]
            for call in self._answered():
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
