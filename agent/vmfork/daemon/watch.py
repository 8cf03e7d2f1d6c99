# SPDX-License-Identifier: Apache-2.0
"""From an edge to a decision: drain what is ready, read every truth, decide once; what is a fork is announced.

Nothing here waits, or looks for a file that the decision does not need, while a fork is on its way to the page.
"""

from __future__ import annotations

import logging
import select
import time
from collections.abc import Callable, Mapping, Sequence
from selectors import EVENT_READ

from vmfork import settings
from vmfork.config import Config
from vmfork.daemon import identity
from vmfork.daemon.announcer import Announcer, Found
from vmfork.daemon.ledger import Ledger
from vmfork.daemon.loop import Loop
from vmfork.daemon.seen import Seen
from vmfork.daemon.sources import VMCLOCK, Sources
from vmfork.daemon.timer import Timer
from vmfork.detector import GENERATION_ID, Decision, WakeUp, decide
from vmfork.edges import NOTHING, Heard, interrupts
from vmfork.model import Detection, ForkEvent, HookResult, Identity, IdentityPolicy, Kind, SourceStatus
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
        self._poll = select.poll()
        self._watched: dict[int, str] = {}
        self._timer = Timer(loop, probe=self._probe)
        self.detection = Detection.NONE
        self._seen = Seen(ledger)
        after = ledger.remembered.kmsg_sequence if ledger.same_boot else None
        self.sources = Sources(paths, config, kmsg_after=after)
        self._announcer = Announcer(
            paths, ledger, self.sources, self._seen, identify=self.identity, on_fork=on_fork, interrupted=interrupted
        )

    # Waiting.

    def start(self) -> None:
        """Take the first decision, then watch; who watches is on the page when this returns."""
        self._wake(frozenset())
        self._announcer.note()
        self._listen()

    def reload(self, config: Config) -> None:
        """Apply another configuration and look for all sources again."""
        self._config = config
        self._probe()

    def stop(self) -> None:
        """Remember how far the kernel's log was read; nobody watches from now on."""
        self._announcer.note()
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
            self._loop.register(descriptor, EVENT_READ, self._on_readable)
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

    def _on_readable(self, _mask: int) -> None:
        # Another edge's call in this round may have drained this one too. And two edges of one fork come microseconds
        # apart: asking again finds the second one more often than what epoll said does, which is in its event then.
        ready = self._ready()
        if ready:
            self._wake(ready)

    def _ready(self) -> frozenset[str]:
        return frozenset([self._watched[descriptor] for descriptor, _ in self._poll.poll(0)])

    # Deciding.

    def _wake(self, ready: frozenset[str]) -> None:
        # With nothing said to be ready (start, new probe) everything is drained.
        heard = {
            edge.name: edge.drain() if not ready or edge.name in ready else NOTHING for edge in self.sources.edges()
        }
        truths = self.sources.read_truths()
        asks_counters = heard["kmsg"].lost and GENERATION_ID not in truths
        words = self._words(heard, asks_counters=asks_counters)
        was = self._seen.memory
        decision = decide(
            was, WakeUp(now_ns=time.monotonic_ns(), words=words, truths=truths, listening=self.sources.listening)
        )
        first_sight, kind = self._seen.learn(decision, truths)
        if decision.fork:
            # The counters speak for the line of the log that was lost.
            spoke = {"kmsg" if name == interrupts.NAME else name for name in words} | (ready & {VMCLOCK, "timer"})
            self._announcer.announce(
                Found(
                    kind=kind,
                    edges=tuple(sorted(spoke)),
                    truths=truths,
                    previous_id=was.truths.get(GENERATION_ID),
                    kernel=heard["kmsg"],
                    counters_are_old=not asks_counters,
                )
            )
        elif decision.memory != was or any(words.values()):
            self._announcer.note()
        self._follow_up(decision, heard, first_sight=first_sight)

    def _words(self, heard: Mapping[str, Heard], *, asks_counters: bool) -> dict[str, int]:
        words = {name: said.words for name, said in heard.items() if said.words}
        # The interrupt counters cannot be lost, as what the kernel said can, and count where no ID can be read. In no
        # other case before the page: they are a column for each processor, and take longer to read than everything
        # else that a fork waits for.
        if asks_counters and self._announcer.counters.have_moved():
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

    # What others ask.

    def trigger(self, reason: str, asked: IdentityPolicy | None) -> ForkEvent:
        """Act as if the guest was forked, because root said so."""
        log.info("triggered by hand: %s", reason)
        truths = self._look()
        return self._announcer.announce(
            Found(
                kind=Kind.MANUAL,
                edges=("manual",),
                truths=truths,
                previous_id=self._seen.memory.truths.get(GENERATION_ID),
                identity=self.identity(Kind.MANUAL, asked),
            )
        )

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
        seen = self._seen.memory.truths
        changed = {name for name, value in truths.items() if seen.get(name, value) != value}
        if changed:
            heard_by_reading = {VMCLOCK} & changed & set(self._watched.values())
            self._loop.after(0, lambda: self._wake(self._ready() | heard_by_reading))
        return truths
