# SPDX-License-Identifier: Apache-2.0
"""The daemon's books: page, memory in /run, state and history in /var, kept in an order that a kill cannot break.

A fork goes into /run first (what is about to be published, as a note of one system call), then onto the page, to the
watchers, and into the whole memory in /run. When the reaction ended it goes into the history and only then counts as
handled on disk. A disk that refuses is a problem to report, not a reason to stop: the next change tells it again.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace

from vmfork import directories, ids, intent, page, state
from vmfork.annotations import Any
from vmfork.blake2 import blake2b
from vmfork.daemon.recall import recall
from vmfork.daemon.refusals import Refusals
from vmfork.detector import GENERATION_ID, Memory
from vmfork.errors import InputError
from vmfork.history import HistoryWriter
from vmfork.model import Detection, EventState, ForkEvent, HookResult, Identity
from vmfork.paths import Paths
from vmfork.state import Remembered, Saved

log = logging.getLogger(__name__)

_PAGE_STATE = {
    EventState.REACTING: page.STATE_REACTING,
    EventState.SETTLED: page.STATE_SETTLED,
    EventState.FAILED: page.STATE_FAILED,
}
# So many results of hooks go into the memory one by one.
_ALL_NOTED = 32


class Ledger:
    """The only writer of page, state and history.

    `refusals` says which files did not take what was written, and `problems` is what it says. Raises InputError where
    the page itself cannot be had, since nothing works without it, Untrusted where others can replace it, and
    UnreadableError where what the last daemon left behind cannot be known.
    """

    def __init__(self, paths: Paths) -> None:
        self._paths = paths
        self.refusals = Refusals()
        self.problems = self.refusals.problems
        self._attempt = self.refusals.attempt
        self._make_directories()
        self.problems |= directories.take_all(paths)
        recalled = recall(paths)
        self.problems.update(recalled.problems)
        self.saved, self.remembered = recalled.saved, recalled.remembered
        self.same_boot = recalled.same_boot
        if recalled.only_noted:
            # A killed detector had noted a fork that its memory does not have yet.
            self._remember(self.remembered)
        self._intent: intent.IntentFile | None = None
        self._attempt(paths.detector_intent, self._open_intent)
        first = max(self.remembered.generation, self.saved.generation)
        self.page = page.PageWriter(paths.generation_page, initial_generation=first)
        self._history = HistoryWriter(paths)
        self._mend()
        # What the disk refused to the last daemon; the state on disk, which comes after it, is the baseline's business.
        self._write_history()

    def _make_directories(self) -> None:
        for directory, mode in directories.kept(self._paths):
            self._attempt(directory, lambda d=directory, m=mode: os.makedirs(d, mode=m, exist_ok=True))  # type: ignore[misc]

    def _open_intent(self) -> None:
        if self._intent is not None:
            self._intent.close()
            self._intent = None
        self._intent = intent.IntentFile(self._paths.detector_intent, boot_id=self.remembered.boot_id)

    def _mend(self) -> None:
        """Finish what a killed detector had begun, and never let the generation go back."""
        event, shown = self.remembered.event, self.page.current
        if event is not None and (self.page.torn or shown.generation < event.generation):
            self._publish(event)
        newest = max(self.remembered.generation, self.saved.generation, self.page.current.generation)
        self.remembered = replace(self.remembered, generation=newest)

    # What the rest of the daemon asks.

    @property
    def event(self) -> ForkEvent | None:
        """The newest fork of this boot."""
        return self.remembered.event

    @property
    def generation(self) -> int:
        return self.page.current.generation

    def tag(self, generation_id: bytes | None) -> str | None:
        """A keyed hash of an ID: equal IDs give equal tags within this boot, and nothing leads back to the ID."""
        if generation_id is None:
            return None
        return blake2b(generation_id, key=self.remembered.tag_key, digest_size=8).hexdigest()

    # What happens to a fork, in this order.

    def publish(self, event: ForkEvent, memory: Memory, *, kmsg_sequence: int | None) -> None:
        """Note a fork and what was read in RAM, then put it onto the page.

        Only what cannot be found out again is noted: this is the way that everybody waits for. `remember` comes next.
        """

        def note() -> None:
            if self._intent is None or not self._intent.write(
                event, kmsg_sequence=kmsg_sequence, truths=memory.truths, credited=memory.credits
            ):
                raise InputError(self._paths.detector_intent, "does not take the note of a fork")

        if not self._attempt(self._paths.detector_intent, note):
            instead = self.remembered.with_fork(
                event, truths=memory.truths, credits=memory.credits, kmsg_sequence=kmsg_sequence
            )
            self._attempt(self._paths.detector_memory, lambda: state.store_remembered(self._paths, instead))
        self._publish(event)

    def remember(
        self,
        memory: Memory,
        *,
        kmsg_sequence: int | None,
        interrupts: Mapping[str, int],
        event: ForkEvent | None = None,
        interrupted: Sequence[HookResult] = (),
    ) -> None:
        """What was read and decided; with `event`, the fork that was published, for `complete` to write down.

        An older fork whose reaction is still going on is superseded then; `interrupted` are its unfinished hooks.
        """
        seen: dict[str, Any] = {"truths": memory.truths, "credits": memory.credits}
        seen |= {"kmsg_sequence": kmsg_sequence, "interrupts": interrupts}
        if event is None:
            self._remember(replace(self.remembered, **seen))
        else:
            self.remembered = self.remembered.with_fork(event, interrupted, **seen)

    def complete(self, microseconds: int | None, *, interrupts: Mapping[str, int]) -> None:
        """After a fork was published: the whole memory, with its latency and counters, only known since then."""
        if self.event is not None:
            event = replace(self.event, detect_latency_us=microseconds)
            self._remember(replace(self.remembered, event=event, interrupts=interrupts))

    def save_progress(self) -> None:
        """For the disk, after a fork was published: the counter, which never goes back, and forks superseded by it."""
        self._save(replace(self.saved, generation=self.generation))
        self._write_history()

    def note_hook(self, result: HookResult) -> None:
        """One hook of the running reaction ended."""
        if self.event is None:
            return
        event = self.event.with_hook(result)
        self.remembered = replace(self.remembered, event=event)
        # A file for each of a thousand would cost the square of their number; the hook of a lost one runs again.
        if len(event.hooks) <= _ALL_NOTED or len(event.hooks) % _ALL_NOTED == 0:
            self._remember(self.remembered)

    def revise(self, identity: Identity) -> None:
        """The newest fork is another case than was thought: all its hooks are still to be run, under this identity."""
        if self.event is not None:
            self._remember(replace(self.remembered, event=replace(self.event, identity=identity, hooks=())))

    def note(self, **changes: Any) -> None:
        """Fields of the memory in /run that have nothing to do with a fork."""
        self._remember(replace(self.remembered, **changes))

    def close_event(
        self,
        outcome: EventState,
        *,
        clock_step_ns: int | None,
        smbios_uuid: str | None,
        instance_id: str | None,
    ) -> None:
        """The reaction to the newest fork ended: history, then disk, then memory, then page."""
        if self.event is None or self.remembered.handled:
            return
        event = replace(self.event, state=outcome, clock_step_ns=clock_step_ns)
        self._remember(replace(self.remembered, event=event, unwritten=(*self.remembered.unwritten, event)))
        self._write_history()
        self.baseline(smbios_uuid=smbios_uuid, instance_id=instance_id, handled_token=event.token)
        self._remember(replace(self.remembered, handled=True))
        self.show_state(outcome)

    def baseline(self, *, smbios_uuid: str | None, instance_id: str | None, handled_token: bytes | None = None) -> None:
        """Save what the next boot compares with; what cannot be read now keeps its old value."""
        if handled_token is None and self.event is not None and self.remembered.handled:
            # The disk may have refused it to the last daemon.
            handled_token = self.event.token
        saved = replace(self.saved, generation=self.generation, handled_token=handled_token or self.saved.handled_token)
        seen = self.remembered.truths.get(GENERATION_ID)
        if seen is not None or saved.generation_id is None:
            # Not before the ID was compared in this boot: a cold fork that is noticed late needs all of this as it was.
            saved = replace(
                saved,
                boot_id=self.remembered.boot_id,
                generation_id=seen,
                smbios_uuid=smbios_uuid or saved.smbios_uuid,
                instance_id=instance_id or saved.instance_id,
            )
        self._save(saved)

    def show_state(self, outcome: EventState) -> None:
        number = _PAGE_STATE.get(outcome)
        if number is not None and self.page.current.state != number:
            self.page.set_state(number)

    def show_detection(self, detection: Detection) -> None:
        """Say on the page who watches."""
        number = list(Detection).index(detection)
        if self.page.current.detection == number:
            return
        if detection is Detection.NONE:
            log.warning("nobody watches: programs cannot rely on the page", extra={"MESSAGE_ID": ids.NOBODY_WATCHES})
        self.page.set_detection(number)

    def _publish(self, event: ForkEvent) -> None:
        self.page.publish(
            generation=event.generation,
            token=event.token,
            detected_at_ns=event.detected_at_ns,
            boottime_ns=event.boottime_ns,
            state=_PAGE_STATE.get(event.state, page.STATE_REACTING),
        )

    def _remember(self, remembered: Remembered) -> None:
        self.remembered = remembered
        self._attempt(self._paths.detector_memory, lambda: state.store_remembered(self._paths, remembered))

    def _save(self, saved: Saved) -> None:
        if saved == self.saved and self._paths.state not in self.problems:
            return
        self.saved = saved
        self._attempt(self._paths.state, lambda: state.store_saved(self._paths, saved))

    def _write_history(self) -> None:
        rest = list(self.remembered.unwritten)
        while rest and self._attempt(self._paths.history, lambda: self._history.append(rest[0])):
            del rest[0]
        if len(rest) != len(self.remembered.unwritten):
            self._remember(replace(self.remembered, unwritten=tuple(rest)))

    def catch_up(self) -> None:
        """Write again what was refused: history before state, as ever."""
        self._make_directories()
        if self._paths.detector_memory in self.problems:
            self._remember(self.remembered)
        if self._paths.detector_intent in self.problems:
            self._attempt(self._paths.detector_intent, self._open_intent)
        self._write_history()
        self._save(self.saved)
        self.refusals.try_again()

    def close(self) -> None:
        """Nobody watches from now on."""
        self.show_detection(Detection.NONE)
        self.page.close()
        if self._intent is not None:
            self._intent.close()
