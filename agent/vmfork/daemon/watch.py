# SPDX-License-Identifier: Apache-2.0
"""From an edge to a fork: drain what is ready, read every truth, decide once, make this clone differ, publish.

The order of a fork is fixed: random numbers first, then a note in /run, then the page, then who this guest is to be,
then everybody who listens, then the reaction, then the whole memory in /run, and the disk last. Nothing before the page
waits for a disk or for another process, or looks for a file that the decision does not need.
"""

from __future__ import annotations

import logging
import select
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from vmfork import ids, settings
from vmfork.config import Config
from vmfork.daemon import freshness, identity
from vmfork.daemon.clocks import Moment
from vmfork.daemon.ledger import Ledger
from vmfork.daemon.loop import Loop
from vmfork.daemon.sources import VMCLOCK, Sources
from vmfork.daemon.timer import Timer
from vmfork.detector import GENERATION_ID, Decision, Memory, WakeUp, decide
from vmfork.edges import NOTHING, Heard, interrupts
from vmfork.edges.logclock import record_age_us
from vmfork.model import UNDECIDED, Detection, ForkEvent, HookResult, Identity, IdentityPolicy, Kind, SourceStatus
from vmfork.paths import Paths

log = logging.getLogger(__name__)

# A host that kept changing a truth while it was read is done long before this.
_READ_AGAIN_SEC = 0.02


class Watch:
    """Waits on all sources; calls `on_fork` with each fork, once, after it was published.

    `interrupted` tells which hooks of the last fork's reaction are running when a new fork takes its place.
    """

    def __init__(
        self,
        loop: Loop,
        paths: Paths,
        config: Config,
        ledger: Ledger,
        *,
        on_fork: Callable[[ForkEvent], None],
        interrupted: Callable[[], Sequence[HookResult]],
    ) -> None:
        self._loop = loop
        self._paths = paths
        self._config = config
        self._ledger = ledger
        self._on_fork = on_fork
        self._interrupted = interrupted
        self._poll = select.poll()
        self._watched: dict[int, str] = {}
        self._timer = Timer(loop, probe=self._probe)
        self.detection = Detection.NONE
        remembered, saved = ledger.remembered, ledger.saved
        truths = dict(remembered.truths)
        # Until the ID is seen in this boot, the one on disk stands in for it: a difference is a cold fork.
        self._id_is_from_disk = GENERATION_ID not in truths and saved.generation_id is not None
        if saved.generation_id is not None:
            truths.setdefault(GENERATION_ID, saved.generation_id)
        self._memory = Memory(truths=truths, credits=remembered.credits)
        self._interrupts = interrupts.Counters(paths, remembered.interrupts)
        self.sources = Sources(paths, config, kmsg_after=remembered.kmsg_sequence if ledger.same_boot else None)

    # Waiting.

    def start(self) -> None:
        """Take the first decision, then watch; who watches is on the page when this returns."""
        self._wake(frozenset())
        self._note()
        self._listen()

    def reload(self, config: Config) -> None:
        """Apply another configuration and look for all sources again."""
        self._config = config
        self._probe()

    def stop(self) -> None:
        """Remember how far the kernel's log was read; nobody watches from now on."""
        self._note()
        self.sources.close()

    def _probe(self) -> None:
        for descriptor in self._watched:
            self._loop.forget(descriptor)
        self.sources.probe(self._config)
        self._wake(frozenset())
        self._listen()

    def _listen(self) -> None:
        for descriptor in self._watched:
            self._loop.forget(descriptor)
        self._poll = select.poll()
        self._watched = {edge.fileno(): edge.name for edge in self.sources.edges() if edge.fileno() >= 0}
        for descriptor in self._watched:
            self._poll.register(descriptor, select.POLLIN)
            self._loop.watch(descriptor, self._on_readable)
        truths = self._look()
        self.detection = self.sources.detection(truths)
        self._ledger.show_detection(self.detection)
        self._set_timer(truths)
        if not self.sources.settled:
            self._loop.after(_READ_AGAIN_SEC, self._listen)
        self._timer.note_failed(failed=self.sources.has_failed())

    def _set_timer(self, truths: Mapping[str, bytes]) -> None:
        # With nothing to watch and nobody to say that something appeared, only looking again helps.
        is_blind = not self.sources.hears_hotplug() and self.detection is Detection.NONE
        if self.sources.needs_timer(truths) or is_blind:
            interval = self._config.get(settings.POLL_INTERVAL_SEC)
            self._timer.every(interval, self._probe if is_blind else lambda: self._wake(self._ready() | {"timer"}))
        else:
            self._timer.stop()

    def _on_readable(self) -> None:
        # Another edge's call in this round may have drained this one too.
        ready = self._ready()
        if ready:
            self._wake(ready)

    def _ready(self) -> frozenset[str]:
        return frozenset(self._watched[descriptor] for descriptor, _ in self._poll.poll(0))

    # Deciding.

    def _wake(self, ready: frozenset[str]) -> None:
        # With nothing said to be ready (start, new probe) everything is drained.
        heard = {
            edge.name: edge.drain() if not ready or edge.name in ready else NOTHING for edge in self.sources.edges()
        }
        truths = self.sources.read_truths()
        words = self._words(heard, truths)
        decision = decide(
            self._memory,
            WakeUp(now_ns=time.monotonic_ns(), words=words, truths=truths, listening=self.sources.listening),
        )
        first_sight = GENERATION_ID in truths and (self._id_is_from_disk or GENERATION_ID not in self._memory.truths)
        is_cold = self._id_is_from_disk and self._ledger.saved.boot_id != self._ledger.remembered.boot_id
        was, self._memory = self._memory, decision.memory
        self._id_is_from_disk = self._id_is_from_disk and not first_sight
        if self._id_is_from_disk:
            # Whether this is a clone of a disk is still to be seen, also after a fork without a readable ID.
            truths_seen = {GENERATION_ID: was.truths[GENERATION_ID], **self._memory.truths}
            self._memory = replace(self._memory, truths=truths_seen)
        if decision.fork:
            kind = Kind.COLD if first_sight and is_cold and GENERATION_ID in decision.changed else Kind.LIVE
            # The counters speak for the line of the log that was lost.
            spoke = {"kmsg" if name == interrupts.NAME else name for name in words} | (ready & {VMCLOCK, "timer"})
            previous = was.truths.get(GENERATION_ID)
            self._announce(kind, tuple(sorted(spoke)), truths, previous, heard=heard)
        elif decision.memory != was or any(words.values()):
            self._note()
        self._follow_up(decision, heard, first_sight=first_sight)

    def _words(self, heard: Mapping[str, Heard], truths: Mapping[str, bytes]) -> dict[str, int]:
        words = {name: said.words for name, said in heard.items() if said.words}
        # They cannot be lost. In no other case before the page: they are a column for each processor, and take longer
        # to read than everything else that a fork waits for.
        if _asks_counters(heard, truths) and self._interrupts.have_moved():
            words[interrupts.NAME] = 1
        return words

    def _follow_up(self, decision: Decision, heard: Mapping[str, Heard], *, first_sight: bool) -> None:
        for name in decision.odd:
            log.warning("%s reported a fork, but the generation ID is unchanged: ignored", name)
        if self.sources.uevent is not None and heard["uevent"].words:
            self.sources.uevent.note_heard()
        if first_sight and not decision.fork:
            self.settle_baseline()
        if not self.sources.settled:
            self._loop.after(_READ_AGAIN_SEC, lambda: self._wake(frozenset()))
        if any(said.hotplug for said in heard.values()):
            self._loop.after(0, self._probe)
        self._timer.note_failed(failed=self.sources.has_failed())

    # Announcing.

    def trigger(self, reason: str, asked: IdentityPolicy | None) -> ForkEvent:
        """Act as if the guest was forked, because root said so."""
        log.info("triggered by hand: %s", reason)
        truths = self._look()
        previous = self._memory.truths.get(GENERATION_ID)
        return self._announce(Kind.MANUAL, ("manual",), truths, previous, identity=self.identity(Kind.MANUAL, asked))

    def _announce(
        self,
        kind: Kind,
        edges: tuple[str, ...],
        truths: Mapping[str, bytes],
        previous: bytes | None,
        *,
        heard: Mapping[str, Heard] | None = None,
        identity: Identity = UNDECIDED,
    ) -> ForkEvent:
        moment = Moment.now()
        kernel = (heard or {}).get("kmsg", NOTHING)
        # The kernel's own line says that it has reseeded; without it nobody may have.
        problem = None if kernel.words else freshness.reseed_kernel(self._paths, truths, moment)
        event = ForkEvent(
            generation=max(self._ledger.generation, self._ledger.remembered.generation) + 1,
            token=freshness.new_token(self._paths, truths, moment),
            kind=kind,
            edges=edges,
            generation_id=truths.get(GENERATION_ID),
            previous_generation_id=previous,
            detected_at_ns=moment.realtime,
            boottime_ns=moment.boottime,
            identity=identity,
        )
        self._ledger.publish(event, self._memory_of_this_boot(), kmsg_sequence=self.sources.kmsg.last_sequence)
        published = time.monotonic_ns()
        if identity is UNDECIDED:
            event = replace(event, identity=self.identity(kind))
        self._note(event)
        self._on_fork(event)
        notice = f"vmforkd: fork noticed, generation {event.generation}"
        latency = record_age_us(self._paths, kernel.record_us, at_ns=published, message=notice)
        if heard is not None and not _asks_counters(heard, truths):
            # They tell of this fork, too: a killed detector's successor must not take that for another one.
            self._interrupts.have_moved()
        self._ledger.complete(latency, interrupts=self._interrupts.seen)
        self._ledger.save_progress()
        log.info(
            "fork noticed: generation %d, %s, by %s, identity: %s",
            event.generation,
            kind.value,
            ", ".join(edges) or "comparing what is remembered",
            event.identity.policy.value,
            extra={"MESSAGE_ID": ids.FORK_NOTICED, "VMFORK_GENERATION": event.generation},
        )
        if problem is not None:
            log.error("the kernel's random numbers may be those of this guest's siblings: %s", problem)
        return replace(event, detect_latency_us=latency)

    def _note(self, event: ForkEvent | None = None) -> None:
        self._ledger.remember(
            self._memory_of_this_boot(),
            kmsg_sequence=self.sources.kmsg.last_sequence,
            interrupts=self._interrupts.seen,
            event=event,
            interrupted=() if event is None else self._interrupted(),
        )

    def _memory_of_this_boot(self) -> Memory:
        if not self._id_is_from_disk:
            return self._memory
        seen = {name: value for name, value in self._memory.truths.items() if name != GENERATION_ID}
        return replace(self._memory, truths=seen)

    # What others ask.

    def identity(self, kind: Kind, asked: IdentityPolicy | None = None) -> Identity:
        """The identity policy that a fork of this kind would get now."""
        return identity.choose(self._paths, self._config, self._ledger, kind, asked=asked)

    def settle_baseline(self) -> None:
        """At the start: save what the next boot compares with, unless a fork is still being reacted to."""
        if self._ledger.remembered.handled:
            identity.save_baseline(self._paths, self._ledger)

    def generation_id(self) -> bytes | None:
        """The generation ID as it can be read now."""
        return self._look().get(GENERATION_ID)

    def statuses(self) -> tuple[SourceStatus, ...]:
        """What every source says of itself."""
        self._look()  # so that the reasons are those of this moment
        return self.sources.statuses(timer_runs=self._timer.runs, interval=self._config.get(settings.POLL_INTERVAL_SEC))

    def _look(self) -> Mapping[str, bytes]:
        """Read every truth outside of a decision; a difference is decided on next.

        A read of vmclock takes its notification away, so that nothing else would wake us for what is seen here.
        """
        truths = self.sources.read_truths()
        seen = self._memory.truths
        changed = {name for name, value in truths.items() if seen.get(name, value) != value}
        if changed:
            heard_by_reading = {VMCLOCK} & changed & set(self._watched.values())
            self._loop.after(0, lambda: self._wake(self._ready() | heard_by_reading))
        return truths


def _asks_counters(heard: Mapping[str, Heard], truths: Mapping[str, bytes]) -> bool:
    """The interrupt counters count where no ID can be read and what the kernel said may be among what was lost."""
    return heard["kmsg"].lost and GENERATION_ID not in truths
