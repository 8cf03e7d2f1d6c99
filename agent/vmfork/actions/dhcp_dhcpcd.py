# SPDX-License-Identifier: Apache-2.0
"""Leases of dhcpcd: rebound when the identity is kept, a new DUID, secret and start when it rotates.

The daemon reads its DUID once, at its start. A random one is written in its place, since dhcpcd would make the next one
of the hypervisor's UUID, which clones share. Nothing is released: the lease may be a sibling's as well.
"""

from __future__ import annotations

import contextlib
import glob
import os
import re
import socket
from dataclasses import dataclass

from vmfork.actions import dhcp, files, processes
from vmfork.actions.commands import operand
from vmfork.actions.contract import ActionContext
from vmfork.actions.dhcp import Plan
from vmfork.actions.processes import Process
from vmfork.errors import ActionError

_PROGRAM, _UNIT = "dhcpcd", "dhcpcd.service"
# "dhcpcd: c0 [ip4]", "dhcpcd: [manager] [ip4] [ip6]", the same behind "[privileged proxy]" where that is root's part.
_TITLE = re.compile(
    r"dhcpcd:(?: \[privileged [a-z]+\])?(?: \[(?:manager|master)\])?(?: ([A-Za-z0-9_.:-]{1,15}))?((?: \[ip[46]\])*)"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Daemon:
    """One running dhcpcd, by its process title: for one interface, or (None) for all of them; None: both versions."""

    processes: tuple[Process, ...]
    interface: str | None
    version: int | None

    @property
    def options(self) -> tuple[str, ...]:
        return () if self.version is None else (f"-{self.version}",)

    @property
    def arguments(self) -> tuple[str, ...]:
        return (*self.options, *(() if self.interface is None else (self.interface,)))


def understood(title: str) -> tuple[str | None, int | None] | None:
    """Interface and version of a dhcpcd's title; None for its helpers and for what is not understood."""
    found = _TITLE.fullmatch(title.strip())
    if found is None:
        return None
    versions = set(re.findall(r"ip([46])", found[2]))
    return found[1], int(versions.pop()) if len(versions) == 1 else None


def forget(context: ActionContext, plan: Plan) -> tuple[str, ...]:
    """Put a new DUID in place and remove secret and leases; the files that were there."""
    place = context.paths.dhcpcd_state
    found = sorted(
        path
        for pattern in ("duid", "secret", "*.lease", "*.lease6")
        for path in glob.glob(os.path.join(glob.escape(place), pattern))
    )
    for path in found:
        duid = os.path.basename(path) == "duid"
        if context.would(f"write a new DUID to {path}" if duid else f"remove {path}"):
            continue
        if duid:
            files.replace_file(path, plan.duid.hex(":").encode() + b"\n", mode=0o644)
            context.say(f"{path}: a new DUID")
        else:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            context.say(f"removed {path}")
    return tuple(found)


def care(context: ActionContext, plan: Plan) -> tuple[str, ...]:
    """Renew or replace the leases of every running dhcpcd; the interfaces."""
    program = context.run.find(_PROGRAM)
    found = _daemons(context, program) if program is not None else ()
    if not found or program is None:
        return ()
    for daemon in found:
        name = daemon.interface or "all interfaces"
        if context.would(f"{'restart' if plan.rotate else 'rebind'} dhcpcd on {name}"):
            continue
        if not plan.rotate:
            _rebind(context, plan, program, daemon)
    if plan.rotate:
        _rotate(context, plan, program, found)
    return tuple(daemon.interface or "all interfaces" for daemon in found)


def _daemons(context: ActionContext, program: str) -> tuple[Daemon, ...]:
    """The daemons of which root's process is there: the only one, or the privileged part, a child of the main one."""
    found = []
    for process in processes.daemons(context.paths, program):
        title = understood(" ".join(process.argv))
        if title is None:
            continue
        main = processes.look(context.paths, process.parent)
        has_main = main is not None and main.argv[:1] and main.argv[0].startswith("dhcpcd:")
        first = main if main is not None and has_main else process
        # Its proxies hold the ports of DHCP, and some of them outlive the others' end by a signal.
        family = (first, *processes.descendants(context.paths, first.pid))
        found.append(Daemon(processes=family, interface=title[0], version=title[1]))
    return tuple(found)


def _rebind(context: ActionContext, plan: Plan, program: str, daemon: Daemon) -> None:
    before = _leases(context, daemon)
    context.run.check(program, *daemon.options, "-n", *_interface(daemon))
    if before and not dhcp.wait_for_lease(context, plan, lambda: _leases(context, daemon) != before):
        raise ActionError(f"dhcpcd on {daemon.interface or 'all interfaces'}: no lease was given in time")
    verified = "; verified" if before else ": it has no lease to verify"
    context.say(f"{daemon.interface or 'all interfaces'}: dhcpcd asked for its lease again{verified}")


def _rotate(context: ActionContext, plan: Plan, program: str, daemons: tuple[Daemon, ...]) -> None:
    if context.dry_run:
        forget(context, plan)
        return
    had_leases = {daemon.arguments: bool(_leases(context, daemon)) for daemon in daemons}
    held = {name: dhcp.leased_addresses(index) for index, name in _interfaces(daemons)}
    managed = context.run.is_active(_UNIT)
    if not managed:
        for daemon in daemons:
            _end(context, program, daemon)
    forget(context, plan)
    duid = os.path.join(context.paths.dhcpcd_state, "duid")
    if not os.path.exists(duid):
        files.replace_file(duid, plan.duid.hex(":").encode() + b"\n", mode=0o644)
    if managed:
        dhcp.wait_for_restart(context, _UNIT, wait_sec=plan.wait_sec)
    else:
        scope = ("systemd-run", "--scope", "--quiet", "--collect", "--") if context.run.systemd else ()
        for daemon in daemons:
            context.run.check(*scope, program, "-b", "-q", *daemon.arguments)
    for daemon in daemons:
        if had_leases[daemon.arguments]:
            _await_lease(context, plan, daemon)
    for name, addresses in held.items():
        for version in (4, 6):
            leased = _leased_address(context, name) if version == 4 else None
            dhcp.drop_replaced(context, plan, name, addresses, version=version, leased=leased)
    _check_identity(duid, plan)
    context.say("dhcpcd has new leases under a new DUID; verified")


def _end(context: ActionContext, program: str, daemon: Daemon) -> None:
    """Ask it to end, which releases nothing, and kill what is left."""
    context.run.run(program, *daemon.options, "-x", *_interface(daemon), timeout=10)
    for process in daemon.processes:
        if not processes.kill(process, context.paths, timeout=2):
            raise ActionError("the running dhcpcd cannot be ended")


def _interface(daemon: Daemon) -> tuple[str, ...]:
    return (operand(daemon.interface),) if daemon.interface else ()


def _leased_address(context: ActionContext, name: str) -> str | None:
    """The address of the DHCPv4 lease of an interface: the file is the server's message (RFC 2131, yiaddr at 16)."""
    try:
        with open(os.path.join(context.paths.dhcpcd_state, f"{name}.lease"), "rb") as file:
            message = file.read(20)
    except OSError:
        return None
    return socket.inet_ntoa(message[16:20]) if len(message) == 20 else None


def _await_lease(context: ActionContext, plan: Plan, daemon: Daemon) -> None:
    if not dhcp.wait_for_lease(context, plan, lambda: _leases(context, daemon)):
        raise ActionError(f"dhcpcd on {daemon.interface or 'all interfaces'}: no lease was given in time")


def _check_identity(path: str, plan: Plan) -> None:
    with files.reported(path), open(path, encoding="ascii", errors="replace") as file:
        if file.read(1024).strip().replace(":", "") != plan.duid.hex():
            raise ActionError(f"{path}: dhcpcd has another DUID than the one that was written")


def _interfaces(daemons: tuple[Daemon, ...]) -> list[tuple[int, str]]:
    named = {daemon.interface for daemon in daemons}
    return [(index, name) for index, name in socket.if_nameindex() if name != "lo" and (None in named or name in named)]


def _leases(context: ActionContext, daemon: Daemon) -> dict[str, tuple[int, int]]:
    """Which lease files there are, with their inode and time: dhcpcd writes one with every lease that it is given."""
    found = {}
    for path in glob.glob(os.path.join(glob.escape(context.paths.dhcpcd_state), "*.lease*")):
        name = re.sub(r"(-[^-]*)?\.lease6?$", "", os.path.basename(path))
        if daemon.interface in (None, name):
            with contextlib.suppress(OSError):
                status = os.stat(path)
                found[path] = (status.st_ino, status.st_mtime_ns)
    return found
