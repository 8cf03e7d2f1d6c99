# SPDX-License-Identifier: Apache-2.0
"""A guest is saved while it runs; clones of it get generation IDs of their own, a control gets the one it had.

What vmfork in each clone says is held against what the hypervisor told it, and shown.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Iterable
from dataclasses import dataclass

from lab import view
from lab.guest import Guest, Saved, Spec
from lab.host import LabError
from scenes.findings import Findings, Row, hook_results, short
from scenes.stage import Stage

log = logging.getLogger(__name__)

_NAMES = ("one", "two", "three")
CONTROL = "control"


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """Which edges may tell of a fork, and a command that succeeds in a guest whose devices have interrupted it."""

    edges: frozenset[str]
    notified: tuple[str, ...] = ()
    clones: int = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """A saved guest, and the time on its clock just before: seconds since its boot."""

    saved: Saved
    uptime: float


def play(stage: Stage, spec: Spec, expected: Expected, findings: Findings) -> None:
    """The whole scene."""
    moment = save(stage, stage.boot(spec))
    fork(stage, moment, expected, findings)


def save(stage: Stage, guest: Guest) -> Moment:
    """Save a guest; it ends with that."""
    uptime = float(guest.check("cat", "/proc/uptime").split()[0])
    return Moment(saved=stage.save(guest), uptime=uptime)


def fork(stage: Stage, moment: Moment, expected: Expected, findings: Findings) -> None:
    """Restore the clones and the control one after the other, and add what they saw."""
    saved = moment.saved
    findings.rows.append(Row(guest="saved", id=_id(saved, None), gen="1"))
    drawn = [_clone(stage, moment, name, expected, findings) for name in _NAMES[: expected.clones]]
    unforked = _control(stage, moment, expected, findings)
    for what in ("random", "uuid4", "urandom"):
        values = [str(one[what]) for one in drawn]
        findings.expect(len(set(values)) == len(values), f"{stage.name}: two clones drew the same {what}")
    shared = {one["shared"] for one in [*drawn, unforked]}
    if findings.expect(len(shared) == 1, f"{stage.name}: these guests are no copies of one state"):
        findings.notes.append(
            f"A generator in that process that nobody reseeds gave {short(shared.pop())} in all {len(drawn) + 1} "
            "guests: they are copies of one state."
        )


def _clone(stage: Stage, moment: Moment, name: str, expected: Expected, findings: Findings) -> dict[str, object]:
    clone = stage.restore(moment.saved, name, uuid.uuid4())
    findings.clones += 1
    try:
        event = view.wait_event(clone, after=1)
    except LabError as error:
        raise LabError(f"{clone.name} noticed no fork: {error}") from error
    drawn = view.drawn(clone, 1)
    if "urandom" not in drawn:
        raise LabError(f"{clone.name}: the process from before the save was not told of the fork")
    if expected.notified:
        clone.until(*expected.notified, what="the interrupts of its devices")
    # A second event of the same fork would have come while the hooks ran.
    forks = _forks(view.events(clone))
    log.info("%s: noticed by %s", clone.name, "+".join(event["edges"]))
    findings.rows.append(
        Row(
            guest=name,
            id=_id(moment.saved, clone),
            forks=str(forks),
            edge="+".join(event["edges"]),
            after=_after(event, moment),
            gen=str(event["generation"]),
            token=short(event["token"]),
            hooks=hook_results([one["result"] for one in event["hooks"]]),
            **_shown(drawn),
        )
    )
    wrong = list(_wrong(clone, event, forks, expected))
    findings.problems += [f"{clone.name}: {one}" for one in wrong]
    findings.noticed += forks == 1
    stage.end(clone, report=bool(wrong))
    return drawn


def _wrong(clone: Guest, event: view.Event, forks: int, expected: Expected) -> Iterable[str]:
    """What this event should not be."""
    if forks != 1:
        yield f"{forks} events of one fork"
    if (event["kind"], event["generation"]) != ("live", 2):
        yield f"a {event['kind']} fork to generation {event['generation']}, not a live one to generation 2"
    if not set(event["edges"]) <= expected.edges:
        yield f"noticed by {'+'.join(event['edges'])}, not by {'+'.join(sorted(expected.edges))}"
    # None: this guest has no ID, or its kernel lets nobody read it.
    if event["generation_id"] is not None and event["generation_id"] != (clone.generation_id or b"").hex():
        yield "another generation ID than the hypervisor's"
    yield from (f"hook {one}" for one in view.failed_hooks(event))
    if event["state"] != "settled":
        yield f"the reaction is {event['state']}"


def _control(stage: Stage, moment: Moment, expected: Expected, findings: Findings) -> dict[str, object]:
    control = stage.restore(moment.saved, CONTROL, moment.saved.guid)
    drawn = view.drawn(control, "now")
    if expected.notified:
        control.until(*expected.notified, what="the interrupts of its devices")
    *before, fence = view.fence(control)
    forks = _forks(before)
    log.info("%s: %s", control.name, "a fork" if forks else "no fork")
    findings.rows.append(
        Row(
            guest=CONTROL,
            id=_id(moment.saved, control),
            forks=str(forks),
            gen=str(fence["generation"] - 1),
            **_shown(drawn),
        )
    )
    findings.control_is_quiet = findings.expect(not before, f"{control.name}: noticed a fork that was none")
    if findings.control_is_quiet and expected.notified:
        findings.notes.append("Its devices interrupted the control as well, with the ID it had: no fork.")
    stage.end(control, report=not findings.control_is_quiet)
    return drawn


def _forks(events: list[view.Event]) -> int:
    return sum(one["kind"] != "manual" for one in events)


def _shown(drawn: dict[str, object]) -> dict[str, str]:
    urandom = drawn["urandom"]
    assert isinstance(urandom, list)
    return {"random": short(drawn["random"]), "uuid4": short(drawn["uuid4"]), "urandom": short(urandom[0])}


def _id(saved: Saved, guest: Guest | None) -> str:
    """The generation ID as it lies in memory, or the vmclock's counter where there is none."""
    if guest is None:
        if saved.board_state and not (saved.spec.board and saved.spec.board.vmgenid):
            return f"clock {saved.board_state[1].generation_counter}"
        return short(saved.guid.bytes_le.hex()) if saved.guid else "-"
    if guest.generation_id is not None:
        return short(guest.generation_id.hex())
    return f"clock {guest.board.clock.generation_counter}" if guest.board else "-"


def _after(event: view.Event, moment: Moment) -> str:
    if event["detect_latency_us"] is not None:
        return f"{event['detect_latency_us'] / 1000:.0f} ms"
    # Unknown where the kernel records nothing, or where the clock of its log is ahead of the others.
    return f"<{event['boottime_ns'] / 1e6 - moment.uptime * 1000:.0f} ms"
