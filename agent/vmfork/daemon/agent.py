# SPDX-License-Identifier: Apache-2.0
"""vmforkd put together: who owns what, in which order it starts and stops, and the answers that need several parts."""

from __future__ import annotations

import gc
import logging
import signal
from collections.abc import Callable, Mapping
from dataclasses import replace

from vmfork import __version__, config, ids, settings, sysd
from vmfork.daemon.again import Again
from vmfork.daemon.catchup import CatchUp
from vmfork.daemon.descriptors import raise_limit
from vmfork.daemon.ledger import Ledger
from vmfork.daemon.loop import Loop
from vmfork.daemon.metrics import Metrics, nobody_watches
from vmfork.daemon.reaction import Reaction
from vmfork.daemon.reactorprocess import ReactorProcess, may_use_units
from vmfork.daemon.service import Service
from vmfork.daemon.settlement import Settlement
from vmfork.daemon.snapshots import Snapshots
from vmfork.daemon.sysgenid import SysGenId
from vmfork.daemon.templatemark import TemplateMark
from vmfork.daemon.watch import Watch
from vmfork.jsonfields import JsonObject, JsonValue
from vmfork.model import UNDECIDED, Detection, EventState, ForkEvent, IdentityPolicy, Kind
from vmfork.page import STATE_FAILED, STATE_REACTING
from vmfork.paths import Paths
from vmfork.varlink.server import Call, Handler

log = logging.getLogger(__name__)

_DEFAULT_UNDO_SEC = 300
# The early boot goes on without its reaction when that takes longer: vmforkd finishes it.
_EARLY_SEC = 45.0


class Vmforkd:
    """The detector. `early` is the pass of vmfork-boot.service: decide about a cold fork, edit files, end."""

    def __init__(self, paths: Paths, *, early: bool = False) -> None:
        self.paths = paths
        self._early = early
        self.loop = Loop()
        # First: it takes back the directory that a part of the configuration may stand in.
        self.ledger = Ledger(paths)
        self.config = config.load(paths)
        self._read_again = Again(self.loop, self.reload)
        CatchUp(self.loop, self.ledger)
        self.mark = TemplateMark(paths, self.ledger)
        self.reaction = Reaction(self.loop, self._reactor_process, early=early)
        self.settlement = Settlement(self.loop, paths, self.ledger, self.mark, self.reaction, on_closed=self._on_closed)
        self.snapshots = Snapshots(self.loop, self.ledger, self.mark, self.reaction, self.settlement.subscribers)
        self.metrics = Metrics(paths, self.ledger, sources=lambda: self.watch.statuses())
        self.sysgenid = SysGenId(paths)
        self._service: Service | None = None
        self.watch = Watch(
            self.loop,
            paths,
            self.config,
            self.ledger,
            on_fork=self._on_fork,
            interrupted=self.settlement.interrupted,
        )
        self._apply_config()

    def _reactor_process(self, ended: Callable[[], None]) -> ReactorProcess:
        as_unit = not self._early and may_use_units(self.paths)
        return ReactorProcess(self.loop, self.paths, as_unit=as_unit, ended=ended)

    # Starting and stopping.

    def run(self) -> None:
        """Watch until told to stop."""
        self.loop.on_signal(signal.SIGTERM, self.loop.stop)
        self.loop.on_signal(signal.SIGINT, self.loop.stop)
        self.loop.on_signal(signal.SIGHUP, self._on_hangup)
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)
        raise_limit()
        self._service = Service(self.loop, self, public=not self._early)
        unfinished = self.ledger.event is not None and not self.ledger.remembered.handled
        if unfinished:
            self._decide()
        self._began = False
        self.watch.start()
        if unfinished and not self._began:
            self._reconsider()
            self.settlement.resume()
        if not self._early:
            self.snapshots.take_up()
        if self._early:
            self._run_early()
        else:
            self._run_on()

    def _decide(self) -> None:
        """A detector that was killed right after it published had not found out yet who this guest is to be."""
        event = self.ledger.event
        if event is not None and event.identity == UNDECIDED:
            self.ledger.revise(self.watch.identity(event.kind))

    def _reconsider(self) -> None:
        """The early boot decided before cloud-init asked the cloud who this is: by now it may be known as a clone."""
        event = self.ledger.event
        if event is None or event.kind is not Kind.COLD or event.identity.policy is not IdentityPolicy.KEEP:
            return
        now = self.watch.identity(Kind.COLD)
        if now.policy is IdentityPolicy.ROTATE:
            log.info("generation %d: its identity is to be rotated after all: %s", event.generation, now.reason)
            self.ledger.revise(now)

    def _run_on(self) -> None:
        self.watch.settle_baseline()
        self._show_side_pages()
        self._write_metrics()
        # What is alive now stays alive: the collector need not look at it again, and the pages that hold it are not
        # written to, which would make a private copy of each in every clone.
        gc.collect()
        gc.freeze()
        sysd.notify(f"READY=1\nSTATUS={self._summary()}", wait_sec=sysd.READY_SEC)
        self.loop.run()
        sysd.notify("STOPPING=1")
        self._stop()

    def _run_early(self) -> None:
        if self.reaction.job is not None:
            self.loop.after(_EARLY_SEC, self.loop.stop)
            self.loop.run()
        self._stop()

    def _stop(self) -> None:
        if self._service is not None:
            self._service.close()
        self.reaction.stop()
        self.watch.stop()
        if not self._early:
            self.sysgenid.remove()
            nobody_watches(self.paths)
        self.ledger.close()

    def _summary(self) -> str:
        live = [one.name for one in self.watch.statuses() if one.live and one.name != "manual"]
        return f"generation {self.ledger.generation}, watching: {', '.join(live) or 'nothing'}"

    def _on_hangup(self) -> None:
        sysd.notify("RELOADING=1", wait_sec=sysd.READY_SEC)
        self.reload()
        sysd.notify(f"READY=1\nSTATUS={self._summary()}", wait_sec=sysd.READY_SEC)

    def reload(self) -> tuple[str, ...]:
        """Read the configuration again, look for all sources again; what is wrong with the configuration."""
        now = config.load(self.paths)
        # A part that the kernel does not show at the moment was not taken back.
        self.config = now if now.is_whole else replace(self.config, problems=now.problems, is_whole=False)
        self._apply_config()
        self.watch.reload(self.config)
        self._show_side_pages()
        self._write_metrics()
        return self.config.problems

    def _apply_config(self) -> None:
        for problem in self.config.problems:
            log.warning("%s", problem, extra={"MESSAGE_ID": ids.CONFIGURATION_BROKEN})
        if self.config.is_whole:
            self._read_again.helped()
        else:
            self._read_again.later()
        self.settlement.config = self.config
        self.metrics.enabled = self.config.get(settings.METRICS)

    def _show_side_pages(self) -> None:
        wanted = self.config.get(settings.SYSGENID) and self.watch.detection is Detection.EVENT
        self.sysgenid.offer(self.ledger.generation, wanted=wanted)

    # What happens.

    def _on_fork(self, event: ForkEvent) -> None:
        self._began = True
        self.sysgenid.publish(event.generation)
        self.snapshots.superseded()
        self.settlement.begin(event)
        self.metrics.noticed(event)
        # Later: nobody may wait for the disk of a file that is read once in a while.
        self.loop.after(0, self._write_metrics)

    def _on_closed(self, event: ForkEvent) -> None:
        self.metrics.ended(event)
        self._write_metrics()
        sysd.notify(f"STATUS={self._summary()}")
        # With most of the heap frozen CPython never comes to a full collection by itself, and only that one empties its
        # lists of free tuples: up to 2000 of each size up to 20, one more of several sizes with each fork.
        gc.collect()

    def _write_metrics(self) -> None:
        # The early boot has no page of metrics to keep up to date.
        if not self._early:
            self.metrics.write()

    # What is asked, by Service.

    def status(self, *, with_ids: bool) -> JsonObject:
        """The whole status, as the interface describes it."""
        generation_id = self.watch.generation_id()
        event = self.ledger.event
        content = self.ledger.page.current
        stragglers: list[JsonValue] = [
            one.to_json() for one in self.settlement.subscribers.stragglers(self.ledger.generation)
        ]
        names = {STATE_REACTING: EventState.REACTING, STATE_FAILED: EventState.FAILED}
        return {
            "generation": content.generation,
            "state": names.get(content.state, EventState.SETTLED).value,
            "detection": list(Detection)[content.detection].value,
            "generation_id": generation_id.hex() if with_ids and generation_id is not None else None,
            "generation_tag": self.ledger.tag(generation_id),
            "sources": [one.to_json(with_hint=True) for one in self.watch.statuses()],
            "last_fork": None if event is None else event.to_json(with_ids=with_ids),
            "identity": self.watch.identity(Kind.LIVE).to_json(),
            "version": __version__,
            "stragglers": stragglers,
            "problems": [
                *self.config.problems,
                *self.ledger.problems.values(),
                *self.reaction.problems,
                *self.sysgenid.problems,
            ],
        }

    def subscribe(self, call: Call) -> None:
        after = call.parameters.integer_or_none("after")
        event = self.ledger.event
        missed = event if event is not None and after is not None and event.generation > after else None
        self.settlement.subscribers.add(
            call,
            track=call.parameters.flag("track"),
            generation=self.ledger.generation,
            # Who comes back after a restart of the daemon still owes the acknowledgement of what it missed.
            acknowledged=self.ledger.generation if missed is None or after is None else after,
            snapshot=self.snapshots.number,
            event=missed,
        )

    def acknowledge(self, call: Call) -> None:
        known = self.settlement.subscribers.acknowledge(
            call.connection,
            generation=call.parameters.integer("generation"),
            snapshot=call.parameters.integer_or_none("snapshot"),
        )
        if known:
            self.snapshots.look()
            call.reply()
        else:
            call.error("io.vmfork.NotSubscribed")

    def trigger(self, reason: str, identity: IdentityPolicy | None) -> ForkEvent:
        return self.watch.trigger(reason, identity)

    def prepare(self, call: Call) -> None:
        seconds = call.parameters.integer_or_none("deadline_sec", minimum=1, maximum=86_400)
        self.snapshots.prepare(
            call,
            template=call.parameters.flag("template"),
            ack_sec=self.config.get(settings.ACK_TIMEOUT_SEC),
            deadline_sec=seconds or _DEFAULT_UNDO_SEC,
        )

    def resume(self, call: Call) -> None:
        self.snapshots.resume(call)

    def reactor_methods(self) -> Mapping[str, Handler]:
        """The reactor's own calls."""
        return {
            "BeginReaction": self.reaction.begin,
            "ReportHook": self.reaction.report,
            "EndReaction": self._end_reaction,
        }

    def _end_reaction(self, call: Call) -> None:
        if not self._early:
            self.reaction.end(call)
            return
        # The early boot only edited files: the fork stays unhandled, and vmforkd finishes it once it is up.
        self.reaction.put_off(call)
        self.loop.stop()
