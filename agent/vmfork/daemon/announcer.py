# SPDX-License-Identifier: Apache-2.0
"""What happens to a fork once it is decided: make this clone differ, publish, tell everybody, and write it down.

The order is fixed: random numbers first, then a note in /run, then the page, then who this guest is to be, then
everybody who listens, then the reaction, then the whole memory in /run, and the disk last. Nothing before the page
waits for a disk or for another process.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from vmfork import ids
from vmfork.daemon import freshness
from vmfork.daemon.clocks import Moment
from vmfork.daemon.ledger import Ledger
from vmfork.daemon.seen import Seen
from vmfork.daemon.sources import Sources
from vmfork.detector import GENERATION_ID
from vmfork.edges import NOTHING, Heard
from vmfork.edges.interrupts import Counters
from vmfork.edges.logclock import record_age_us
from vmfork.model import UNDECIDED, ForkEvent, HookResult, Identity, Kind
from vmfork.paths import Paths

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A fork as it was found: what told of it, what was read, and what the kernel's log said.

    `counters_are_old`: the counters of interrupts were not looked at on the way here.
    """

    kind: Kind
    edges: tuple[str, ...]
    truths: Mapping[str, bytes]
    previous_id: bytes | None
    kernel: Heard = NOTHING
    counters_are_old: bool = False
    identity: Identity = UNDECIDED


class Announcer:
    """Announces each fork once.

    `identify(kind)` says who the guest is to be; `on_fork` is called with the fork after it was published;
    `interrupted` tells which hooks of the last fork's reaction are running when a new fork takes its place.
    """

    def __init__(
        self,
        paths: Paths,
        ledger: Ledger,
        sources: Sources,
        seen: Seen,
        *,
        identify: Callable[[Kind], Identity],
        on_fork: Callable[[ForkEvent], None],
        interrupted: Callable[[], Sequence[HookResult]],
    ) -> None:
        self._paths = paths
        self._ledger = ledger
        self._sources = sources
        self._seen = seen
        self._identify = identify
        self._on_fork = on_fork
        self._interrupted = interrupted
        self.counters = Counters(paths, ledger.remembered.interrupts)

    def announce(self, found: Found) -> ForkEvent:
        """Do all of it, in the order that the module describes; the event as it was written down."""
        moment = Moment.now()
        # The kernel's own line says that it has reseeded; without it nobody may have.
        problem = None if found.kernel.words else freshness.reseed_kernel(self._paths, found.truths, moment)
        event = ForkEvent(
            generation=max(self._ledger.generation, self._ledger.remembered.generation) + 1,
            token=freshness.new_token(self._paths, found.truths, moment),
            kind=found.kind,
            edges=found.edges,
            generation_id=found.truths.get(GENERATION_ID),
            previous_generation_id=found.previous_id,
            detected_at_ns=moment.realtime,
            boottime_ns=moment.boottime,
            identity=found.identity,
        )
        self._ledger.publish(event, self._seen.in_this_boot, kmsg_sequence=self._sources.kmsg.last_sequence)
        published = time.monotonic_ns()
        if event.identity is UNDECIDED:
            event = replace(event, identity=self._identify(event.kind))
        self.note(event)
        self._on_fork(event)
        event = self._complete(event, found, published)
        _log(event, problem)
        return event

    def note(self, event: ForkEvent | None = None) -> None:
        """Have the ledger remember what was seen, and the fork that was published."""
        self._ledger.remember(
            self._seen.in_this_boot,
            kmsg_sequence=self._sources.kmsg.last_sequence,
            interrupts=self.counters.seen,
            event=event,
            interrupted=() if event is None else self._interrupted(),
        )

    def _complete(self, event: ForkEvent, found: Found, published: int) -> ForkEvent:
        notice = f"vmforkd: fork noticed, generation {event.generation}"
        latency = record_age_us(self._paths, found.kernel.record_us, at_ns=published, message=notice)
        if found.counters_are_old:
            # They tell of this fork, too: a killed detector's successor must not take that for another one.
            self.counters.have_moved()
        self._ledger.complete(latency, interrupts=self.counters.seen)
        self._ledger.save_progress()
        return replace(event, detect_latency_us=latency)


def _log(event: ForkEvent, problem: str | None) -> None:
    log.info(
        "fork noticed: generation %d, %s, by %s, identity: %s",
        event.generation,
        event.kind.value,
        ", ".join(event.edges) or "comparing what is remembered",
        event.identity.policy.value,
        extra={"MESSAGE_ID": ids.FORK_NOTICED, "VMFORK_GENERATION": event.generation},
    )
    if problem is not None:
        log.error("the kernel's random numbers may be those of this guest's siblings: %s", problem)
