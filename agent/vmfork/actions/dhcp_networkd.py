# SPDX-License-Identifier: Apache-2.0
"""Leases of systemd-networkd, which derives its DUID from the machine ID.

When the identity is kept the lease is renewed. When it rotates, networkd is restarted first, since it reads the machine
ID once, and then configures its DHCP interfaces anew; a restart keeps the old lease without releasing it. A networkd
that took its lease under the new machine ID already (20-machine-id restarts it, too) only renews. Interfaces without
DHCP are left alone.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from vmfork.actions import dhcp, duid, machine_id
from vmfork.actions.contract import ActionContext
from vmfork.actions.dhcp import Plan
from vmfork.actions.files import resolve
from vmfork.errors import ActionError
from vmfork.paths import Paths

_UNIT = "systemd-networkd.service"
_DHCP_LINE = re.compile(r"^\s*DHCP\s*=\s*(\S*)", re.MULTILINE)
_ON = frozenset(("yes", "true", "on", "1", "y", "t", "ipv4", "ipv6", "v4", "v6", "both"))
_MAX_FILE = 256 * 1024
_RFC4361 = b"\xff"


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """What networkd keeps of a DHCPv4 lease: which file it is (another one after each answer), and the client ID."""

    inode: int
    changed_ns: int
    client_id: str

    @property
    def duid(self) -> bytes:
        """The DUID within the client ID (RFC 4361), empty where that is something else."""
        try:
            raw = bytes.fromhex(self.client_id)
        except ValueError:
            return b""
        return raw[5:] if raw[:1] == _RFC4361 else b""


def managed(paths: Paths) -> tuple[int, ...]:
    """The indexes of the interfaces that networkd runs DHCP on, by its state files and its configuration."""
    try:
        names = sorted(os.listdir(paths.networkd_links))
    except OSError:
        return ()
    return tuple(int(name) for name in names if name.isdigit() and _wants_dhcp(paths, int(name)))


def lease(paths: Paths, index: int) -> Lease | None:
    """The DHCPv4 lease of an interface, None if it has none."""
    path = os.path.join(paths.networkd_leases, str(index))
    try:
        status = os.stat(path)
    except OSError:
        return None
    identity = _values(path).get("CLIENTID", "")
    return Lease(inode=status.st_ino, changed_ns=status.st_mtime_ns, client_id=identity)


def forget(context: ActionContext, plan: Plan) -> tuple[str, ...]:
    """Nothing on disk outlives a boot here: the DUID follows the machine ID."""
    return ()


def care(context: ActionContext, plan: Plan) -> tuple[str, ...]:
    """Renew or replace the leases of networkd's DHCP interfaces; the interfaces."""
    if not context.run.is_active(_UNIT):
        return ()
    found = {index: name for index in managed(context.paths) if (name := dhcp.name_of(index)) is not None}
    if not found:
        return ()
    names = ", ".join(found.values())
    if plan.rotate:
        if context.would(f"restart {_UNIT}, then configure {names} anew, under the new machine ID's DUID"):
            return tuple(found.values())
    elif context.would(f"renew the leases of {names} (systemd-networkd)"):
        return tuple(found.values())
    before = {index: lease(context.paths, index) for index in found}
    anew = plan.rotate and not all(kept is not None and _is_of_this_machine(context, kept) for kept in before.values())
    if anew:
        dhcp.wait_for_restart(context, plan, _UNIT)
    verb = "reconfigure" if anew else "renew"
    for name in found.values():
        context.run.check("networkctl", verb, name)
    problems = [
        problem for index, name in found.items() if (problem := _verify(context, plan, index, name, before[index]))
    ]
    if problems:
        raise ActionError("; ".join(problems))
    return tuple(found.values())


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


def _wants_dhcp(paths: Paths, index: int) -> bool:
    if os.path.exists(os.path.join(paths.networkd_leases, str(index))):
        return True
    state = _values(os.path.join(paths.networkd_links, str(index)))
    if "DHCP6_CLIENT_DUID" in state:
        return True
    places = [state.get("NETWORK_FILE", ""), *state.get("NETWORK_FILE_DROPINS", "").replace('"', "").split()]
    asked = ""
    for place in places:
        if place.startswith("/"):
            for value in _DHCP_LINE.findall(_read(resolve(paths, paths.at(place)))):
                asked = value
    return asked.lower() in _ON


def _values(path: str) -> Mapping[str, str]:
    """The KEY=value lines of a state file."""
    return dict(line.partition("=")[::2] for line in _read(path).splitlines() if not line.startswith("#"))


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read(_MAX_FILE)
    except OSError:
        return ""
