# SPDX-License-Identifier: Apache-2.0
"""A history from before a play: forks that the play did not send, told from its own by their generation."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from vmfork.model import UNDECIDED, EventState, ForkEvent, Kind
from vmfork.paths import Paths

# No fork of a play has the generation that a guest begins with.
LONG_AGO = 1
_FORK = ForkEvent(
    generation=LONG_AGO,
    token=bytes(16),
    kind=Kind.LIVE,
    edges=("kmsg",),
    generation_id=None,
    previous_generation_id=None,
    detected_at_ns=1,
    boottime_ns=1,
    identity=UNDECIDED,
    state=EventState.SETTLED,
)


def write_past(paths: Paths, forks: int) -> None:
    """So many forks from long ago; their tokens are numbers from 0 on."""
    past = (replace(_FORK, token=number.to_bytes(16, "big")) for number in range(forks))
    Path(paths.history).write_text("".join(json.dumps(event.to_json(with_ids=True)) + "\n" for event in past))


def is_past(event: ForkEvent) -> bool:
    """Whether this is one of them."""
    return event.generation == LONG_AGO
