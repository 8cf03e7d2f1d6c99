# SPDX-License-Identifier: Apache-2.0
"""When is a fork settled? When its reaction succeeded and every tracked subscriber acknowledged or is overdue."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from vmfork import ids, settings
from vmfork.config import Config
from vmfork.daemon.ledger import Ledger
from vmfork.daemon.loop import Deadline, Loop
from vmfork.daemon.reaction import Job, Phase, Reaction
from vmfork.daemon.subscribers import FORK, SETTLED, Subscribers
from vmfork.daemon.templatemark import TemplateMark
from vmfork.model import EventState, ForkEvent, HookOutcome, HookResult, IdentityPolicy
from vmfork.paths import Paths
from vmfork.truths.evidence import read_instance_id, read_smbios

log = logging.getLogger(__name__)


class Settlement:
    """Follows the newest fork from its announcement to its end. `on_closed` is called when its outcome is in."""

    def __init__(
        self,
        loop: Loop,
        paths: Paths,
        ledger: Ledger,
        mark: TemplateMark,
        reaction: Reaction,
        *,
        on_closed: Callable[[ForkEvent], None],
    ) -> None:
        self._loop = loop
        self._paths = paths
        self._ledger = ledger
        self._mark = mark
        self._reaction = reaction
        self._on_closed = on_closed
        self.config = Config()
        self.subscribers = Subscribers(self._look)
        self._deadline: Deadline | None = None
        self._time_is_up = False
        # The clock step of a reaction that succeeded and waits for acknowledgements, in a tuple because it may be None.
        self._done: tuple[int | None] | None = None

    def begin(self, event: ForkEvent) -> None:
        """A fork was published: tell everybody, react to it."""
        # First: telling may end a connection, and what follows from that is not to be judged by an old deadline.
        self._reset()
        self.subscribers.expect()
        self.subscribers.tell(FORK, event.generation, event=event)
        self._react(event)

    def resume(self) -> None:
        """After a start of the daemon: go on with a fork whose reaction did not end."""
        event = self._ledger.event
        if event is not None and not self._ledger.remembered.handled:
            log.info("the reaction to generation %d is not finished; going on with it", event.generation)
            self._reset()
            self._react(event)

    def _reset(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        self._deadline = None
        self._time_is_up = False
        self._done = None

    def _react(self, event: ForkEvent) -> None:
        self._deadline = self._loop.after(self.config.get(settings.ACK_TIMEOUT_SEC), self._give_up)
        done = {hook.name: hook for hook in event.hooks if hook.result is HookOutcome.OK}
        self._reaction.run(
            Job(
                phase=Phase.AFTER_FORK,
                token=event.token.hex(),
                event=event,
                ended=self._reaction_ended,
                hook_ended=self._ledger.note_hook,
                finished=done,
            )
        )

    def interrupted(self) -> Sequence[HookResult]:
        """The hooks that run now for the newest fork."""
        job = self._reaction.job
        return job.interrupted() if job is not None and job.phase is Phase.AFTER_FORK else ()

    def _reaction_ended(self, _job: Job, outcome: EventState, clock_step_ns: int | None) -> None:
        if outcome is EventState.SETTLED:
            self._done = (clock_step_ns,)
            self._look()
        else:
            self._close(EventState.FAILED, clock_step_ns)

    def _give_up(self) -> None:
        self._time_is_up = True
        self._look()

    def _look(self) -> None:
        if self._time_is_up:
            # Also who subscribed only after that: else one who never acknowledges could come late and stop everything.
            self.subscribers.give_up(self._ledger.generation)
        if self._done is not None and not self.subscribers.awaited(self._ledger.generation):
            self._close(EventState.SETTLED, self._done[0])

    def _close(self, outcome: EventState, clock_step_ns: int | None) -> None:
        self._reset()
        event = self._ledger.event
        if outcome is EventState.SETTLED and event is not None and event.identity.policy is IdentityPolicy.ROTATE:
            # Before the fork counts as handled: who goes on after a kill comes here again only until then.
            self._mark.remove()
        self._ledger.close_event(
            outcome,
            clock_step_ns=clock_step_ns,
            smbios_uuid=read_smbios(self._paths).value,
            instance_id=read_instance_id(self._paths).value,
        )
        event = self._ledger.event
        if event is None:
            return
        failed = [hook.name for hook in event.hooks if hook.result in (HookOutcome.FAILED, HookOutcome.TIMEOUT)]
        if outcome is EventState.SETTLED:
            log.info(
                "settled: generation %d",
                event.generation,
                extra={"MESSAGE_ID": ids.REACTION_SETTLED, "VMFORK_GENERATION": event.generation},
            )
        else:
            log.error(
                "the reaction to generation %d failed: %s",
                event.generation,
                ", ".join(failed) or "see its log",
                extra={"MESSAGE_ID": ids.REACTION_FAILED, "VMFORK_GENERATION": event.generation},
            )
        self.subscribers.tell(SETTLED, event.generation, event=event)
        self._on_closed(event)
