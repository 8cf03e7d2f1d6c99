# SPDX-License-Identifier: Apache-2.0
"""Why hooks run and in which order: after a fork, before a snapshot (backwards), after a snapshot.

An `Occasion` is everything that all hooks of one run are told; nothing in it is a generation ID.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from vmfork.model import ForkEvent, IdentityPolicy
from vmfork.reactor.discovery import Hook


class Phase(StrEnum):
    """What the hooks are run for; the value is their first argument."""

    AFTER_FORK = "after-fork"
    BEFORE_SNAPSHOT = "before-snapshot"
    AFTER_SNAPSHOT = "after-snapshot"


@dataclass(frozen=True, slots=True, kw_only=True)
class Occasion:
    """One run of the hooks. `event` is the fork, or before and after a snapshot the last one, if there was any.

    `early`: the system is still booting, so hooks edit files and wait for nothing.
    """

    phase: Phase = Phase.AFTER_FORK
    generation: int
    event: ForkEvent | None = None
    identity: IdentityPolicy | None = None
    dry_run: bool = False
    early: bool = False
    root: str = ""

    def payload(self) -> bytes:
        """What every hook reads on stdin: the event as one line of JSON, or nothing if there never was a fork."""
        if self.event is None:
            return b""
        fields = self.event.to_json()
        if self.early:
            fields["early"] = True
        return json.dumps(fields).encode() + b"\n"


def in_order(hooks: Iterable[Hook], phase: Phase) -> list[tuple[Hook, ...]]:
    """The groups that run side by side, one after the other: by rising NN, before a snapshot by falling NN."""
    backwards = phase is Phase.BEFORE_SNAPSHOT
    ordered = sorted(hooks, key=lambda hook: (hook.order or 0, hook.name), reverse=backwards)
    return [tuple(group) for _, group in itertools.groupby(ordered, key=lambda hook: hook.order or 0)]
