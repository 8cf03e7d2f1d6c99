# SPDX-License-Identifier: Apache-2.0
"""Leases of NetworkManager: asked for again when the identity is kept, taken anew under a new secret when it rotates.

Its stable identifiers come from secret_key and the machine ID, which it reads at its start. A restart leaves the
connections up; each one with DHCP is then brought up again. Connections with static addresses are left alone.
"""

from __future__ import annotations

import contextlib
import glob
import os
import re
from dataclasses import dataclass

from vmfork.actions import dhcp
from vmfork.actions.commands import operand
from vmfork.actions.contract import ActionContext
from vmfork.actions.dhcp import Plan
from vmfork.errors import ActionError

_UNIT = "NetworkManager.service"
_OPTION = re.compile(r"DHCP[46]\.OPTION\[\d+\]:(\w+) = (.*)")
_TIMES = ("expiry", "dhcp_lease_time", "life_starts", "max_life")
# How many seconds to wait for an answer, for the moment that it takes to put the profile's own value back.
_HARMLESS = ("ipv4.dhcp-timeout", "101", "ipv6.dhcp-timeout", "101")
_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """A device with an active connection that takes addresses from a server."""

    name: str
    connection: str


def forget(context: ActionContext, plan: Plan) -> tuple[str, ...]:
    """Remove the secret and the leases; the files that were there."""
    place = glob.escape(context.paths.network_manager_state)
    found = sorted(path for pattern in ("secret_key", "*.lease") for path in glob.glob(os.path.join(place, pattern)))
    for path in found:
        if not context.would(f"remove {path}"):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            context.say(f"removed {path}")
    return tuple(found)


def care(context: ActionContext, plan: Plan) -> tuple[str, ...]:
    """Renew or replace the leases of NetworkManager's DHCP connections; the devices."""
    if context.run.find("nmcli") is None or not context.run.is_active(_UNIT):
        return ()
    found = devices(context)
    if not found:
        return ()
    names = ", ".join(device.name for device in found)
    if context.would(f"restart {_UNIT} and bring {names} up again" if plan.rotate else f"apply {names} again"):
        if plan.rotate:
            forget(context, plan)
        return tuple(device.name for device in found)
    before = {device.name: options(context, device.name) for device in found}
    if plan.rotate:
        forget(context, plan)
        dhcp.wait_for_restart(context, _UNIT, wait_sec=plan.wait_sec)
    problems = [problem for device in found if (problem := _renew(context, plan, device, before[device.name]))]
    if problems:
        raise ActionError("; ".join(problems))
    return tuple(device.name for device in found)


def devices(context: ActionContext) -> tuple[Device, ...]:
    """The connected devices whose connection has DHCP or router advertisements (method auto)."""
    listed = context.run.check("nmcli", "-t", "-e", "no", "-f", "DEVICE,STATE,CON-UUID", "device").text
    found = []
    for line in listed.splitlines():
        # A device name may hold colons, the other two fields may not.
        name, state, connection = [*line.rsplit(":", 2), "", ""][:3]
        if state != "connected" or not _UUID.fullmatch(connection):
            continue
        methods = context.run.check(
            "nmcli", "-g", "ipv4.method,ipv6.method", "connection", "show", "uuid", connection
        ).text.split()
        if {"auto", "dhcp"} & set(methods):
            found.append(Device(name=operand(name), connection=connection))
    return tuple(found)


def options(context: ActionContext, name: str) -> dict[str, str]:
    """The DHCP options of a device's leases."""
    told = context.run.run("nmcli", "-t", "-e", "no", "-f", "DHCP4,DHCP6", "device", "show", name).text
    return {found[1]: found[2].strip() for line in told.splitlines() if (found := _OPTION.match(line))}


def _renew(context: ActionContext, plan: Plan, device: Device, before: dict[str, str]) -> str | None:
    """What is wrong with a device's lease, None if it is new."""

    def is_new() -> bool:
        now = options(context, device.name)
        return bool(now) and any(now.get(key) != before.get(key) for key in _TIMES)

    wait = str(max(15, round(plan.wait_sec)))
    up = ("nmcli", "--wait", wait, "connection", "up", "uuid", device.connection, "ifname", device.name)
    if plan.rotate:
        context.run.check(*up, timeout=float(wait) + 5)
    else:
        # Only where something changed in the connection does NetworkManager ask the server again, and so does it again
        # when it is as it was. To bring the connection up would take the addresses away meanwhile.
        context.run.run("nmcli", "--wait", "5", "device", "modify", device.name, *_HARMLESS)
        applied = context.run.run("nmcli", "--wait", "5", "device", "reapply", device.name)
        if before and not (applied.ok and dhcp.wait_for_lease(context, plan, is_new)):
            context.run.check(*up, timeout=float(wait) + 5)
    if not before:
        context.say(f"{device.name}: NetworkManager applied the connection again; it has no DHCP lease to verify")
        return None
    if not dhcp.wait_for_lease(context, plan, is_new):
        return f"{device.name}: no lease was given in time"
    old, new = before.get("dhcp_client_identifier"), options(context, device.name).get("dhcp_client_identifier")
    if plan.rotate and (old is None or old == new):
        context.say(f"{device.name}: a new lease, but the client ID is the MAC address or was configured")
    else:
        context.say(
            f"{device.name}: NetworkManager has a new lease{' under a new client ID' if plan.rotate else ''}; verified"
        )
    return None
