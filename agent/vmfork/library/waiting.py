# SPDX-License-Identifier: Apache-2.0
"""Wait until a fork was noticed, or until this guest has recovered from one: gates for start scripts and tests.

Both take the generation that was noted before the snapshot, so they are right also when they are called after the
resume and before anybody has noticed the fork: there is no false all-clear.
"""

from __future__ import annotations

import time

from vmfork.errors import VmforkError
from vmfork.jsonfields import Fields
from vmfork.library.root import paths
from vmfork.library.subscription import Subscription
from vmfork.model import EventState, ForkEvent
from vmfork.paths import Paths
from vmfork.varlink.client import Client

_LONGEST_ANSWER = 10.0


def wait(after: int | None = None, timeout: float | None = None) -> ForkEvent | None:
    """Wait for a fork after the generation `after` (without it: after this moment) and return it.

    Returns at once if it has already happened, None when `timeout` seconds have passed. Raises Unavailable where
    vmforkd does not answer at the beginning; a restart in between is waited out.
    """
    deadline = _deadline(timeout)
    where = paths()
    subscription = Subscription(where, track=False, after=after)
    try:
        while True:
            notice = subscription.wait(deadline)
            if notice is None or notice.kind == "fork":
                return None if notice is None else notice.event
    finally:
        subscription.close()


def settled(after: int | None = None, timeout: float | None = None) -> ForkEvent | None:
    """Wait for a fork as `wait` does, and then until the reaction to the newest one succeeded and every tracked
    program acknowledged it or used up the admin's deadline. Returns that fork, None when `timeout` seconds have passed.

    Raises VmforkError if the reaction failed: the guest is then not fit to be used as if it was nobody's clone. Raises
    Unavailable where vmforkd does not answer at the beginning.
    """
    deadline = _deadline(timeout)
    where = paths()
    subscription = Subscription(where, track=False, after=after)
    newest: ForkEvent | None = None
    try:
        while True:
            notice = subscription.wait(deadline)
            if notice is None:
                return None
            if notice.kind == "fork":
                newest = notice.event
            if newest is None or notice.kind not in ("fork", "hello", "settled"):
                continue
            # Asked and not taken from the notice: after "hello" its "settled" may have been told before we listened.
            ended = _ended(where, newest, deadline)
            if ended is not None:
                return ended
    finally:
        subscription.close()


def _ended(where: Paths, newest: ForkEvent, deadline: float | None) -> ForkEvent | None:
    """The newest fork if the guest is settled after it, None while it is not."""
    left = _LONGEST_ANSWER if deadline is None else min(_LONGEST_ANSWER, max(0.01, deadline - time.monotonic()))
    try:
        with Client.connect(where.public_socket, timeout=left) as client:
            answer = client.call("io.vmfork.GetStatus")
    except VmforkError:
        # The daemon went away: the subscription will find it again and say "hello".
        return None
    status = Fields(answer, where.public_socket).object("status")
    generation, state = status.integer("generation"), status.text("state")
    if generation < newest.generation or state == EventState.REACTING:
        return None
    if state != EventState.SETTLED:
        raise VmforkError(f"the reaction to fork {generation} failed", hint="see: vmforkctl status")
    last = status.object_or_none("last_fork")
    return newest if last is None else ForkEvent.from_json(last)


def _deadline(timeout: float | None) -> float | None:
    return None if timeout is None else time.monotonic() + timeout
