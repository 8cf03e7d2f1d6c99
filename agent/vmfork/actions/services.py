# SPDX-License-Identifier: Apache-2.0
"""Restarts or reloads the running units that the admin lists, and says how each of them ended up.

Only units that run are touched: what is stopped stays stopped. Names were checked when the configuration was read, so
none can be taken for an option. The wait is bounded; a unit that is not up again by then is a failure.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from vmfork import settings
from vmfork.actions.contract import Action, ActionContext
from vmfork.errors import ActionError, ActionSkipped

_PROPERTIES = ("Id", "Names", "ActiveState", "SubState", "InvocationID", "Job", "CanReload", "ReloadResult")
_PAUSE_SEC = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitState:
    """What the service manager says of a unit; `invocation` is another one after each start."""

    name: str
    active: str
    sub: str
    invocation: str
    busy: bool
    can_reload: bool
    reload_failed: bool

    @property
    def runs(self) -> bool:
        return self.active in ("active", "reloading", "refreshing")


def after_fork(context: ActionContext) -> None:
    restart, reload = context.get(settings.SERVICES_RESTART), context.get(settings.SERVICES_RELOAD)
    reload = tuple(unit for unit in reload if unit not in restart)
    if not restart and not reload:
        raise ActionSkipped("no units are configured (Restart=, Reload=)")
    if context.early:
        raise ActionSkipped("the units start after this")
    if not context.run.systemd:
        raise ActionSkipped("systemd does not run here")
    before = states(context, (*restart, *reload))
    running = {unit: state for unit, state in before.items() if state.runs}
    for unit in before.keys() - running.keys():
        context.say(f"{unit} is {before[unit].active}: left alone")
    if not running:
        raise ActionSkipped("none of the configured units runs")
    restart = tuple(unit for unit in restart if unit in running)
    stubborn = [unit for unit in reload if unit in running and not running[unit].can_reload]
    reload = tuple(unit for unit in reload if unit in running and unit not in stubborn)
    running = {unit: running[unit] for unit in (*restart, *reload)}
    for verb, units in (("restart", restart), ("reload", reload)):
        if units and context.would(f"{verb} {', '.join(units)}"):
            continue
        if units:
            # All at once: the service manager knows in which order.
            context.run.systemctl(f"try-{verb}" if verb == "restart" else verb, *units, no_block=True)
    if not context.dry_run and running:
        _report(context, running, restart)
    if stubborn:
        raise ActionError(f"cannot be reloaded: {', '.join(stubborn)}", hint="name them in Restart= instead")


def states(context: ActionContext, units: tuple[str, ...]) -> dict[str, UnitState]:
    """The state of each unit, by the name that was asked for."""
    told = context.run.check("systemctl", "show", f"--property={','.join(_PROPERTIES)}", "--", *units, timeout=5).text
    found: dict[str, UnitState] = {}
    # One block for each unit, in the order asked for; an alias shows another Id.
    for unit, block in zip(units, told.strip().split("\n\n"), strict=False):
        values = dict(line.partition("=")[::2] for line in block.splitlines())
        found[unit] = UnitState(
            name=unit,
            active=values.get("ActiveState", "unknown"),
            sub=values.get("SubState", "unknown"),
            invocation=values.get("InvocationID", ""),
            busy=values.get("Job", "") not in ("", "0"),
            can_reload=values.get("CanReload", "") == "yes",
            reload_failed=values.get("ReloadResult", "success") != "success",
        )
    if len(found) != len(set(units)):
        raise ActionError("systemctl show did not answer for every unit")
    return found


def _report(context: ActionContext, before: dict[str, UnitState], restarted: tuple[str, ...]) -> None:
    end = time.monotonic() + context.run.remaining(context.get(settings.SERVICES_WAIT_SEC))
    while True:
        now = states(context, tuple(before))
        waiting = [unit for unit in before if _problem(before[unit], now[unit], restarted=unit in restarted)]
        if not any(now[unit].busy or now[unit].active.endswith("ing") for unit in waiting) or time.monotonic() >= end:
            break
        time.sleep(_PAUSE_SEC)
    for unit, state in now.items():
        verb = "restarted" if unit in restarted else "reloaded"
        context.say(f"{unit}: {_problem(before[unit], state, restarted=unit in restarted) or f'{verb}, {state.sub}'}")
    if waiting:
        raise ActionError(f"not up again: {', '.join(waiting)}", hint=f"journalctl -u {waiting[0]}")


def _problem(before: UnitState, now: UnitState, *, restarted: bool) -> str:
    """What is wrong with a unit, empty if it is up again."""
    if now.busy:
        return f"still {now.active} ({now.sub})"
    if not now.runs or now.active != "active":
        return f"is {now.active} ({now.sub})"
    if restarted and now.invocation == before.invocation:
        return "was not restarted"
    if not restarted and now.reload_failed:
        return "could not be reloaded"
    return ""


ACTION = Action(
    name="services",
    hook="70-services",
    summary="Restart or reload the units that the admin lists.",
    keys=(settings.SERVICES_RESTART, settings.SERVICES_RELOAD, settings.SERVICES_WAIT_SEC),
    after_fork=after_fork,
)
