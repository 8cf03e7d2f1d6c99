# SPDX-License-Identifier: Apache-2.0
"""`vmforkctl wait`: returns when this guest was forked, or when the reaction to that has settled.

With `--after N`, a generation noted before the snapshot was taken, there is no race: a fork that was noticed before
this command started counts, and one that was not noticed yet is waited for.
"""

from __future__ import annotations

import argparse
import time

from vmfork.cli import EXIT_FAILED, EXIT_TIMEOUT
from vmfork.cli.output import print_json, remark, wants_json
from vmfork.cli.reach import call, connect
from vmfork.errors import DaemonUnreachable
from vmfork.jsonfields import Fields, JsonObject
from vmfork.model import EventState, ForkEvent
from vmfork.paths import Paths
from vmfork.varlink.client import Overdue

_RECONNECT_SEC = 0.2
# A fork that was waited for is seldom followed by so many.
_NEWEST = 64
_SETTLED = (EventState.SETTLED, EventState.FAILED)


def wait(options: argparse.Namespace) -> int:
    """0 when it happened (with --settled: and settled), 1 when that reaction failed, 124 when the time was up."""
    paths = Paths.from_environment()
    until = None if options.timeout is None else time.monotonic() + options.timeout
    try:
        event = _follow(paths, options.after, until, settled=options.settled)
    except Overdue:
        remark(options, "vmforkctl: timed out")
        return EXIT_TIMEOUT
    if wants_json(options):
        print_json(options, _with_ids(paths, event).to_json(with_ids=True))
    elif not options.quiet:
        print(f"generation {event.generation}: {event.kind.value}, {event.state.value}")
    return EXIT_FAILED if options.settled and event.state is EventState.FAILED else 0


def _with_ids(paths: Paths, event: ForkEvent) -> ForkEvent:
    """The same fork as the list shows it: to root with its generation IDs, which no stream carries."""
    for fields in call(paths, "ListForks", {"limit": _NEWEST}).objects("forks"):
        listed = ForkEvent.from_json(fields)
        if listed.token == event.token:
            return listed
    return event


def _follow(paths: Paths, after: int | None, until: float | None, *, settled: bool) -> ForkEvent:
    """Stay subscribed until the answer is in; a daemon that is restarted meanwhile is connected to again."""
    first = True
    while True:
        try:
            with connect(paths, timeout=_left(until)) as client:
                asked: JsonObject = {"track": False, "after": after}
                for reply in client.stream("io.vmfork.Subscribe", asked, timeout=_left(until)):
                    first = False
                    notice = Fields(reply, "notice")
                    # The generation at the start of the wait counts, over a restart of the daemon too.
                    after = notice.integer("generation") if after is None else after
                    shown = notice.object_or_none("event")
                    event = None if shown is None else ForkEvent.from_json(shown)
                    if event is not None and event.generation > after and (not settled or event.state in _SETTLED):
                        return event
        except Overdue:
            raise
        except DaemonUnreachable:
            if first:
                raise
        if until is not None and time.monotonic() >= until:
            raise Overdue("timed out")
        time.sleep(_RECONNECT_SEC)


def _left(until: float | None) -> float | None:
    return None if until is None else max(0.001, until - time.monotonic())
