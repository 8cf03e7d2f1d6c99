# SPDX-License-Identifier: Apache-2.0
"""Leases of systemd-networkd, which derives its DUID from the machine ID.

When the identity is kept the lease is renewed. When it rotates, networkd is restarted first, since it reads the machine
ID once, and then configures its DHCP interfaces anew; a restart keeps the old lease without releasing it. A networkd
that took its lease under the new machine ID already (20-machine-id restarts it, too) only renews. Interfaces without
DHCP are left alone.
"""

from __future__ import annotations

from vmfork.actions import dhcp, duid, machine_id, processes, spread
from vmfork.actions.contract import ActionContext
from vmfork.actions.dhcp import Plan
from vmfork.actions.files import resolve
from vmfork.actions.networkd import UNIT, Lease, lease, managed
from vmfork.errors import ActionError

_RESTART_SEC = 120.0
# What an answer takes, at most, before a new MAC address makes networkd ask again anyway.
_ANSWER_SEC = 10.0


def forget(context: ActionContext, plan: Plan) -> tuple[str, ...]:
    """Nothing on disk outlives a boot here: the DUID follows the machine ID."""
    return ()


def care(context: ActionContext, plan: Plan) -> tuple[str, ...]:
    """Renew or replace the leases of networkd's DHCP interfaces; the interfaces."""
    if not context.run.is_active(UNIT):
        return ()
    found = {index: name for index in managed(context.paths) if (name := dhcp.name_of(index)) is not None}
    if not found:
        return ()
    names = ", ".join(found.values())
    if plan.rotate:
        if context.would(f"restart {UNIT}, then configure {names} anew, under the new machine ID's DUID"):
            return tuple(found.values())
    elif context.would(f"renew the leases of {names} (systemd-networkd)"):
        return tuple(found.values())
    before = {index: lease(context.paths, index) for index in found}
    anew = plan.rotate and not all(kept is not None and _is_of_this_machine(context, kept) for kept in before.values())
    if anew:
        dhcp.wait_for_restart(context, UNIT, wait_sec=plan.wait_sec)
    verb = "reconfigure" if anew else "renew"
    for name in found.values():
        context.run.check("networkctl", verb, "--", name)
    problems = [
        problem for index, name in found.items() if (problem := _verify(context, plan, index, name, before[index]))
    ]
    if problems:
        raise ActionError("; ".join(problems))
    return tuple(found.values())


def take_up_machine_id(context: ActionContext) -> None:
    """Where 20-machine-id left networkd to SpreadSec=: restart it before an interface gets another MAC address.

    A networkd whose interface changes its MAC address releases the lease that it has. That must not be the template's,
    which siblings use; a restart keeps it unreleased and takes a lease under the new machine ID's DUID.
    """
    if spread.window(context) <= 0 or not context.run.is_active(UNIT):
        return
    old = [index for index in managed(context.paths) if _is_of_another_machine(context, index)]
    if not old or context.would(f"restart {UNIT}, so that it does not release a lease that siblings have"):
        return
    # Half of what the hook has left: a machine that is slow is given more time by TimeoutSec=.
    dhcp.wait_for_restart(context, UNIT, wait_sec=context.run.remaining(_RESTART_SEC) / 2)
    context.say(f"restarted {UNIT}, which takes up the new machine ID")
    processes.wait_until(
        lambda: not any(_is_of_another_machine(context, index) for index in old),
        timeout=min(_ANSWER_SEC, context.run.remaining(_RESTART_SEC) / 2),
    )


def _is_of_another_machine(context: ActionContext, index: int) -> bool:
    kept = lease(context.paths, index)
    return kept is not None and kept.duid != b"" and not _is_of_this_machine(context, kept)


def _verify(context: ActionContext, plan: Plan, index: int, name: str, before: Lease | None) -> str | None:
    """What is wrong with an interface's lease, None if it is new."""
    if before is None:
        context.say(f"{name}: asked systemd-networkd for DHCP again; it had no DHCPv4 lease to compare with")
        return None

    def is_new() -> bool:
        now = lease(context.paths, index)
        return now is not None and (now.inode, now.changed_ns) != (before.inode, before.changed_ns)

    if not dhcp.wait_for_lease(context, plan, is_new):
        return f"{name}: no lease was given in time"
    now = lease(context.paths, index)
    if not plan.rotate or now is None:
        context.say(f"{name}: systemd-networkd has a new lease; verified")
    elif _is_of_this_machine(context, now):
        context.say(f"{name}: systemd-networkd has a new lease under the new machine ID's client ID; verified")
    elif now.client_id != before.client_id:
        context.say(f"{name}: systemd-networkd has a new lease under a new client ID; verified")
    elif not now.duid or duid.is_of_hardware(now.duid):
        context.say(f"{name}: a new lease, but the client ID does not come from the machine ID (ClientIdentifier=)")
    else:
        return f"{name}: the client ID is still the old one"
    return None


def _is_of_this_machine(context: ActionContext, kept: Lease) -> bool:
    """Whether a lease's client ID comes from the machine ID of now."""
    try:
        present = machine_id.current(resolve(context.paths, context.paths.machine_id))
        return kept.duid in duid.of_machine(present or "")
    except (ActionError, OSError, ValueError):
        return False
