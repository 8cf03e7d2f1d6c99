# SPDX-License-Identifier: Apache-2.0
"""Steps CLOCK_REALTIME to the hypervisor's time and tells the time daemon, once the clock is wrong by a threshold.

A PTP clock of the hypervisor is believed in both directions. The RTC, which has whole seconds and may itself be part
of what was restored, only moves the clock forward. After a step the clock is measured again.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

from vmfork import settings
from vmfork.actions import ptp
from vmfork.actions.contract import Action, ActionContext
from vmfork.annotations import Protocol
from vmfork.errors import AbsentError, ActionError, ActionSkipped
from vmfork.paths import Paths

_NS = 1_000_000_000
_MS = 1_000_000
_RTC_THRESHOLD_MS = 1500
_RTC_TICK_WAIT_SEC = 1.3
# What chronyd still has to correct dates from before the fork: it is done with before our clock is measured. After
# the step its measurements are worth nothing, and new ones are wanted at once.
CHRONY_BEFORE = ("makestep",)
CHRONY_AFTER = ("reset sources", "burst 2/6")
_TIMESYNCD = "systemd-timesyncd.service"
_OTHER_DAEMONS = ("ntpsec.service", "ntp.service", "openntpd.service")


class Reference(Protocol):
    """A clock to set ours by. `forward_only`: it is not believed when it says that ours is ahead."""

    @property
    def name(self) -> str: ...
    @property
    def forward_only(self) -> bool: ...
    @property
    def threshold_ms(self) -> int: ...

    def offset_ns(self, *, exact: bool) -> int:
        """How far ours must be moved, in ns; `exact` may take a second. AbsentError: it cannot be read this time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PtpReference:
    """A PTP clock of the hypervisor."""

    paths: Paths
    clock: ptp.Clock
    threshold_ms: int
    forward_only: bool = False

    @property
    def name(self) -> str:
        return f"{self.clock.device} ({self.clock.name or 'PTP'})"

    def offset_ns(self, *, exact: bool) -> int:
        return ptp.measure(self.paths, self.clock).ns


@dataclass(frozen=True, slots=True, kw_only=True)
class RtcReference:
    """The real-time clock, in whole seconds; exact at the moment when it ticks."""

    paths: Paths
    threshold_ms: int
    forward_only: bool = True

    @property
    def name(self) -> str:
        return self.paths.rtc_epoch

    def offset_ns(self, *, exact: bool) -> int:
        first = self._seconds()
        if not exact:
            return first * _NS - time.time_ns()
        end = time.monotonic() + _RTC_TICK_WAIT_SEC
        while (seconds := self._seconds()) == first:
            if time.monotonic() >= end:
                raise AbsentError(f"{self.name}: does not tick")
            time.sleep(0.002)
        return seconds * _NS - time.time_ns()

    def _seconds(self) -> int:
        try:
            with open(self.paths.rtc_epoch, encoding="ascii") as file:
                return int(file.read(32))
        except (OSError, ValueError) as error:
            raise AbsentError(f"{self.name}: cannot be read: {error}") from error


def after_fork(context: ActionContext) -> None:
    if context.paths.is_fake and not context.dry_run:
        raise ActionSkipped("the clock belongs to the machine around this root")
    adjust(context, references(context))


def references(context: ActionContext) -> tuple[Reference, ...]:
    """The clocks to try, best first."""
    paths, threshold = context.paths, context.get(settings.CLOCK_THRESHOLD_MS)
    devices = context.get(settings.CLOCK_DEVICES)
    found: list[Reference] = [
        PtpReference(paths=paths, clock=clock, threshold_ms=threshold) for clock in ptp.clocks(paths, devices)
    ]
    if os.path.exists(paths.rtc_epoch):
        if rtc_is_local(paths):
            context.say(f"not using {paths.rtc_epoch}: {paths.adjtime} says that it is in local time")
        else:
            found.append(RtcReference(paths=paths, threshold_ms=max(threshold, _RTC_THRESHOLD_MS)))
    return tuple(found)


def rtc_is_local(paths: Paths) -> bool:
    """Whether the third line of /etc/adjtime says LOCAL; without the file the RTC is in UTC."""
    try:
        with open(paths.adjtime, encoding="ascii", errors="replace") as file:
            lines = file.read(4096).splitlines()
    except OSError:
        return False
    return len(lines) > 2 and lines[2].strip() == "LOCAL"


def adjust(context: ActionContext, candidates: tuple[Reference, ...]) -> None:
    """Set the clock by the first reference that can be read; ActionSkipped where there is none."""
    for reference in candidates:
        try:
            offset = reference.offset_ns(exact=False)
        except AbsentError as error:
            context.say(f"not using {reference.name}: {error}")
            continue
        if not is_wrong(offset, reference):
            context.say(f"nothing to step: {describe(offset, reference)}")
            return
        _step(context, reference, offset)
        return
    raise ActionSkipped("no clock of the hypervisor can be read here: neither PTP nor RTC")


def is_wrong(offset: int, reference: Reference) -> bool:
    """Whether an offset asks for a step: over the threshold, and in a direction that this reference may ask for."""
    return abs(offset) > reference.threshold_ms * _MS and not (reference.forward_only and offset < 0)


def describe(offset: int, reference: Reference) -> str:
    """An offset for people: where our clock stands, seen from the reference."""
    return f"the clock is {abs(offset) / _NS:.6f} s {'behind' if offset > 0 else 'ahead of'} {reference.name}"


def _step(context: ActionContext, reference: Reference, offset: int) -> None:
    if context.would(f"step the clock by {offset / _NS:+.6f} s to {reference.name}, and tell the time daemon"):
        return
    chronyd = chronyc(context)
    tell_chrony(context, chronyd, CHRONY_BEFORE)
    try:
        offset = reference.offset_ns(exact=True)
        if not is_wrong(offset, reference):
            context.say(f"chronyd's last correction was enough: {describe(offset, reference)}")
            return
        time.clock_settime_ns(time.CLOCK_REALTIME, time.clock_gettime_ns(time.CLOCK_REALTIME) + offset)
        rest = reference.offset_ns(exact=True)
    except AbsentError as error:
        raise ActionError(f"the clock was ahead or behind, then its reference was lost: {error}") from error
    except PermissionError as error:
        raise ActionError("the clock cannot be set", hint="run as root with CAP_SYS_TIME") from error
    if abs(rest) > reference.threshold_ms * _MS:
        raise ActionError(f"stepped the clock, and yet {describe(rest, reference)}")
    context.say(f"stepped the clock by {offset / _NS:+.6f} s; verified: {describe(rest, reference)}")
    tell_chrony(context, chronyd, CHRONY_AFTER)
    _restart_daemons(context)


def chronyc(context: ActionContext) -> str | None:
    """The program to talk to chronyd with, where one runs here."""
    return context.run.find("chronyc") if os.path.exists(context.paths.chronyd_socket) else None


def tell_chrony(context: ActionContext, program: str | None, commands: tuple[str, ...]) -> None:
    """Tell chronyd. A refusal is said but is no failure: chronyd finds the step by itself, only later."""
    for command in commands if program is not None else ():
        finished = context.run.run(program or "", "-n", *command.split(), timeout=5)
        context.say(f"told chronyd: {command}" if finished.ok else f"chronyd refused {command!r}: {finished.complaint}")


def _restart_daemons(context: ActionContext) -> None:
    for unit in (_TIMESYNCD, *_OTHER_DAEMONS):
        if context.run.is_active(unit):
            context.run.systemctl("try-restart", unit, no_block=True)
            context.say(f"restarted {unit}")


ACTION = Action(
    name="clock",
    hook="15-clock",
    summary="Step the clock to the hypervisor's time and tell the time daemon.",
    keys=(settings.CLOCK_THRESHOLD_MS, settings.CLOCK_DEVICES),
    after_fork=after_fork,
)
