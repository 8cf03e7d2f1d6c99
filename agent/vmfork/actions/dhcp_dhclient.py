# SPDX-License-Identifier: Apache-2.0
"""Leases of ISC dhclient, as ifupdown and others start it: the running client is replaced by one with its arguments.

dhclient has no request for renewal, and a release would give away the lease of a sibling that has the same identity. So
it is killed (its addresses stay) and started again: with its lease file it confirms the lease; with a new DUID in an
otherwise empty one it is a new client. Only arguments of a process that is really root's dhclient are believed.
"""

from __future__ import annotations

import glob
import os
import re
from dataclasses import dataclass

from vmfork.actions import dhcp, files, processes
from vmfork.actions.contract import ActionContext
from vmfork.actions.dhcp import Plan
from vmfork.actions.processes import Process
from vmfork.errors import ActionError

_PROGRAM = "dhclient"
_WITH_VALUE = frozenset(("-p", "-s", "-g", "-H", "-F", "-V", "-C", "-R", "-D", "-e", "-cf", "-df", "-lf", "-pf", "-sf"))
_WITH_VALUE |= {"-timeout", "--prefix-len-hint", "--address-prefix-len", "--decline-wait-time", "--dad-wait-time"}
_LEASE = re.compile(r"^lease6? \{.*?^\}", re.MULTILINE | re.DOTALL)
_ENDS = re.compile(r"^\s*(?:renew|rebind|expire|starts|iaaddr|fixed-address) ([^;{]+)[;{]", re.MULTILINE)
_DEFAULT_DUID = re.compile(r'^default-duid ("(?:[^"\\]|\\.)*"|[0-9a-fA-F:]+);', re.MULTILINE)
_LEASE_TIME = re.compile(r"^\s*option dhcp-lease-time (\d+);", re.MULTILINE)
_GIVEN = re.compile(r"^\s*(?:fixed-address|iaaddr) ([0-9a-f.:]+) ?[;{]", re.MULTILINE)
_MAX_FILE = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Client:
    """One running dhclient. `by_duid`: it names itself by the DUID, not by the MAC address alone."""

    process: Process
    version: int
    interfaces: tuple[str, ...]
    lease_file: str
    foreground: bool
    by_duid: bool


def understood(process: Process, default_directory: str) -> Client:
    """What the arguments of a running dhclient say."""
    words = list(process.argv[1:])
    values: dict[str, str] = {}
    flags: set[str] = set()
    names: list[str] = []
    while words:
        word = words.pop(0)
        if word in _WITH_VALUE and words:
            values[word] = words.pop(0)
        elif word.startswith("-"):
            flags.add(word)
        else:
            names.append(word)
    version = 6 if "-6" in flags else 4
    usual = os.path.join(default_directory, "dhclient6.leases" if version == 6 else "dhclient.leases")
    return Client(
        process=process,
        version=version,
        interfaces=tuple(names),
        lease_file=values.get("-lf", usual),
        foreground="-d" in flags,
        by_duid=version == 6 or "-i" in flags,
    )


def lease_file_with(duid: bytes) -> bytes:
    """A lease file that knows no lease, only this DUID, in the notation of dhclient.leases(5)."""
    return ('default-duid "' + "".join(f"\\{byte:03o}" for byte in duid) + '";\n').encode()


def forget(context: ActionContext, plan: Plan) -> tuple[str, ...]:
    """Before any client runs: give every lease file of the usual place a new DUID and no leases; the files."""
    found = sorted(glob.glob(os.path.join(glob.escape(context.paths.dhclient_state), "dhclient*.leases")))
    changed = [path for path in found if _read(path)]
    for path in changed:
        if not context.would(f"empty {path} and put a new DUID there"):
            files.replace_file(files.resolve(context.paths, path), lease_file_with(plan.duid), mode=0o644)
            context.say(f"{path}: no leases any more, and a new DUID")
    return tuple(changed)


def care(context: ActionContext, plan: Plan) -> tuple[str, ...]:
    """Renew or replace the leases of every running dhclient; the interfaces."""
    program = context.run.find(_PROGRAM)
    if program is None:
        return ()
    running = processes.daemons(context.paths, program)
    clients = [understood(process, context.paths.dhclient_state) for process in running]
    problems: list[str] = []
    for client in clients:
        try:
            _restart(context, plan, program, client)
        except ActionError as error:
            problems.append(f"dhclient on {_name(client)}: {error}")
    if problems:
        raise ActionError("; ".join(problems))
    return tuple(_name(client) for client in clients)


def _restart(context: ActionContext, plan: Plan, program: str, client: Client) -> None:
    name = _name(client)
    fresh = plan.rotate and client.by_duid
    what = "a new DUID and a new lease" if plan.rotate else "the lease confirmed"
    if context.would(f"restart dhclient on {name} (DHCPv{client.version}) for {what}"):
        return
    if plan.rotate and not client.by_duid:
        context.say(f"{name}: dhclient names itself by the MAC address only: the server sees the same client")
    before = _read(client.lease_file)
    addresses = {name: dhcp.leased_addresses(index) for name in client.interfaces if (index := dhcp.index_of(name))}
    # The file first: the old client writes to the one that it has open, and a supervisor may start the next at once.
    if plan.rotate:
        duid = lease_file_with(plan.duid) if fresh else b""
        files.replace_file(files.resolve(context.paths, client.lease_file), duid, mode=0o644)
    if not processes.kill(client.process, context.paths, timeout=2):
        raise ActionError("the running client cannot be ended")
    _start(context, program, client)
    old = _last(before) if not plan.rotate else ""
    if not dhcp.wait_for_lease(context, plan, lambda: _last(_read(client.lease_file)) not in ("", old)):
        if client.version == 6 and not plan.rotate and _is_running(context, program, client):
            context.say(f"{name}: DHCPv6 lease sent for confirmation, which leaves no trace to verify")
            return
        raise ActionError("no lease was given in time", hint="does the DHCP server answer?")
    now = _read(client.lease_file)
    _check_identity(name, before, now, fresh=fresh)
    for interface, held in addresses.items():
        if plan.rotate:
            given = _GIVEN.findall(now)[-1:]
            dhcp.drop_replaced(
                context, plan, interface, held, version=client.version, leased=given[0] if given else None
            )
        _take_lifetime(context, interface, now)
    context.say(
        f"{name}: dhclient has a new lease (DHCPv{client.version}){' under a new DUID' if fresh else ''}; verified"
    )


def _start(context: ActionContext, program: str, client: Client) -> None:
    if client.foreground:
        # Its supervisor starts it again; a second one would fight with that.
        if not processes.wait_until(lambda: _is_running(context, program, client), timeout=context.run.remaining(5)):
            raise ActionError("the client ran in the foreground (-d) and nobody started it again")
        return
    arguments = [*client.process.argv[1:]]
    # It must not wait for the lease: a hook has a deadline, a client has none.
    arguments = arguments if "-nw" in arguments else ["-nw", *arguments]
    # In a scope of its own, or it would end with the unit that this hook runs in.
    scope = ("systemd-run", "--scope", "--quiet", "--collect", "--") if context.run.systemd else ()
    context.run.check(*scope, program, *arguments)


def _is_running(context: ActionContext, program: str, client: Client) -> bool:
    wanted = (client.version, client.interfaces)
    found = (understood(process, "") for process in processes.daemons(context.paths, program))
    return any((other.version, other.interfaces) == wanted for other in found)


def _check_identity(name: str, before: str, now: str, *, fresh: bool) -> None:
    old, new = (_DEFAULT_DUID.findall(text)[-1:] for text in (before, now))
    if fresh and (not new or new == old):
        raise ActionError(f"{name} still has its old DUID")


def _take_lifetime(context: ActionContext, interface: str, leases: str) -> None:
    """dhclient-script adds the address again, which the kernel refuses without taking the new lifetime."""
    last = _LEASE.findall(leases)[-1:]
    if not last or f'interface "{interface}"' not in last[0]:
        return
    given, seconds = _GIVEN.search(last[0]), _LEASE_TIME.search(last[0])
    if given is None or seconds is None:
        return
    lifetime = ("valid_lft", seconds[1], "preferred_lft", seconds[1])
    for address in dhcp.leased_addresses(dhcp.index_of(interface) or 0):
        if address.text == given[1]:
            change = ("-4", "addr", "change", f"{address.text}/{address.prefix}", "dev", interface)
            context.run.check("ip", *change, *lifetime)


def _last(leases: str) -> str:
    """Address and times of the last lease of a file, empty if there is no lease."""
    blocks = _LEASE.findall(leases)
    return " ".join(_ENDS.findall(blocks[-1])) if blocks else ""


def _name(client: Client) -> str:
    return " ".join(client.interfaces) or "all interfaces"


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read(_MAX_FILE)
    except OSError:
        return ""
