# SPDX-License-Identifier: Apache-2.0
"""SpreadSec=: clones that resumed together ask a shared server one after the other, each when its fork token says.

A clone's share counts from the moment at which it noticed the fork, so that what has waited once waits no more: neither
the next hook nor one that is run again. The reactor gives the hooks that wait (settings.SPREADING_HOOKS) the window on
top of their time-out; a hook of another name that calls such an action has to have the time.
"""

from __future__ import annotations

import os
import time

from vmfork import config, settings
from vmfork.actions.contract import ActionContext
from vmfork.errors import ActionError

_LEASES_HOOK = "40-leases"
# What asking takes where the server answers: a wait that leaves less would end in a time-out that blames the server.
_ASKING_SEC = 2.0


def share(token: bytes, window: float) -> float:
    """How long after its fork, in seconds, this clone may talk to a server of all clones: by its token, evenly."""
    return int.from_bytes(token[:8], "little") / 2**64 * window if window > 0 else 0.0


def window(context: ActionContext) -> float:
    """SpreadSec=; 0 where nothing is to be waited for: in the early boot, in a directory, or when it is off."""
    if context.early or context.paths.is_fake:
        return 0.0
    return config.load(context.paths).get(settings.SPREAD_SEC)


def left(context: ActionContext, window: float) -> float:
    """Seconds until this clone's share of a window is over."""
    whole = share(context.token, window)
    if context.event is None:
        return whole
    passed = (time.clock_gettime_ns(time.CLOCK_BOOTTIME) - context.event.boottime_ns) / 1e9
    # A fork that an earlier boot noticed may lie in this clock's future.
    return min(whole, max(0.0, whole - passed))


def wait(context: ActionContext) -> None:
    """Wait until this clone's share is over; ActionError where the hook has no time to ask anything after that."""
    seconds = left(context, window(context))
    if seconds <= 0 or context.would(f"wait {seconds:.1f} s, what is left of this clone's share of SpreadSec="):
        return
    given = context.run.remaining(seconds + _ASKING_SEC)
    if given < seconds + _ASKING_SEC:
        raise ActionError(
            f"this clone's share of SpreadSec= ends in {seconds:.1f} s, and TimeoutSec= ends the hook in {given:.1f} s",
            hint="raise TimeoutSec= of this hook by SpreadSec=; without that, only "
            + ", ".join(sorted(settings.SPREADING_HOOKS))
            + " get it on top",
        )
    context.say(f"waiting {seconds:.1f} s, what is left of this clone's share of SpreadSec=")
    time.sleep(seconds)


def leases_will_follow(context: ActionContext) -> bool:
    """Whether the reaction comes to the shipped 40-leases, after this clone's share of a window."""
    if context.event is None or window(context) <= 0:
        return False
    if os.path.lexists(os.path.join(context.paths.hooks_etc, _LEASES_HOOK)):
        return False
    return config.load(context.paths).hook(_LEASES_HOOK).enable != "no"
