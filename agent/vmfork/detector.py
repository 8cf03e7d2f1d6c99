# SPDX-License-Identifier: Apache-2.0
"""The decision: was this guest forked? Pure: no clock, no file, no kernel; what it remembers goes in and comes out.

The decision is taken once for each wake-up, after every ready edge was drained and every truth was read:

1. A truth differs from what was last seen: one fork. Every authoritative edge that has not spoken for it gets one
   credit, because its word about the same fork may still be on the way.
2. An authoritative edge spoke: it spends its credit if it has one. Otherwise, if the generation ID is readable and
   was not changed, its word is odd and is not believed. Otherwise one fork.
3. Anything else is no fork: the first sight of a truth, equal values, an edge that is not authoritative.

A fork may be decided while a truth that was seen before cannot be read. What it is now is part of that fork, and not of
another one: it is forgotten, and its next sight is a first one.

What this guarantees, for a host that changes all truths of a guest before the guest runs on and before any edge fires:

* With a readable generation ID, each wake-up that finds it changed is exactly one fork, and nothing else ever is.
  Edges may come early or late (by less than `CREDIT_NS`), doubled, or never. Forks between which no wake-up fell
  count as one: only the last ID can be seen.
* With an ID that is readable only now and then, a fork that an edge speaks of at once is counted once, whether or not
  the ID can be read then. One that no edge speaks of is counted when the ID is read again, unless a fork was counted
  since it was read last: only the last value can be seen.
* With only vmclock's counter readable the same holds for edges that speak at most once for each fork.
* With no readable truth, each wake-up in which an authoritative edge speaks is one fork, except for a second edge's
  word within `CREDIT_NS` of the first one's. A host that repeats an edge without a change cannot be told from a fork.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

# How long after a fork another edge's word still counts as the same fork.
CREDIT_NS = 2_000_000_000

# The truth that the kernel's edges speak about; the other one is vmclock's counter.
GENERATION_ID = "generation_id"


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """What the detector carries from one wake-up to the next: the truths last seen, the credits and their ends."""

    truths: Mapping[str, bytes] = field(default_factory=dict)
    credits: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class WakeUp:
    """Everything that is known when one decision is due.

    `now_ns` is CLOCK_MONOTONIC; `words` counts what each authoritative edge said since the last decision; `truths`
    holds what could be read this time; `listening` names the authoritative edges that could still speak.
    """

    now_ns: int
    words: Mapping[str, int] = field(default_factory=dict)
    truths: Mapping[str, bytes] = field(default_factory=dict)
    listening: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """The outcome: `odd` names the edges whose word was not believed, `changed` the truths that differ."""

    memory: Memory
    fork: bool
    changed: tuple[str, ...] = ()
    odd: tuple[str, ...] = ()


def decide(memory: Memory, wake_up: WakeUp) -> Decision:
    """Take the decision that the module describes."""
    changed = tuple([name for name, value in wake_up.truths.items() if memory.truths.get(name, value) != value])
    open_credits = {name: end for name, end in memory.credits.items() if wake_up.now_ns < end}
    spoke = set()
    for name, count in wake_up.words.items():
        if count > 0 and name in open_credits:
            del open_credits[name]
            count -= 1
        if count > 0:
            spoke.add(name)
    believed = spoke if not changed and not _id_is_unchanged(memory, wake_up) else set()
    fork = bool(changed or believed)
    if fork:
        waiting = wake_up.listening - spoke
        open_credits.update(dict.fromkeys(waiting, wake_up.now_ns + CREDIT_NS))
    return Decision(
        memory=Memory(truths=wake_up.truths if fork else {**memory.truths, **wake_up.truths}, credits=open_credits),
        fork=fork,
        changed=changed,
        odd=() if fork else tuple(sorted(spoke)),
    )


def _id_is_unchanged(memory: Memory, wake_up: WakeUp) -> bool:
    """An ID that is seen for the first time proves nothing about what it was before."""
    seen = wake_up.truths.get(GENERATION_ID)
    return seen is not None and memory.truths.get(GENERATION_ID) == seen
