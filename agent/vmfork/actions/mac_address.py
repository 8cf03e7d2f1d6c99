# SPDX-License-Identifier: Apache-2.0
"""A new MAC address for the configured interfaces, from fork token and interface name, or from a command.

The address is locally administered and the same when the action is repeated for the same fork. It lasts until the
next boot, when the hypervisor's own address counts again. Only interfaces that are named in Interfaces= are touched;
the IPv6 addresses that came from the old MAC address go with it.
"""

from __future__ import annotations

import fnmatch
import glob
import hashlib
import os
import re
from collections.abc import Sequence

from vmfork import settings
from vmfork.actions import dhcp_networkd, ipv6_eui64, netlink, spread
from vmfork.actions.commands import operand
from vmfork.actions.contract import Action, ActionContext
from vmfork.actions.netlink import Link
from vmfork.annotations import Any
from vmfork.errors import ActionError, ActionSkipped

_MAC = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}")
_MULTICAST, _LOCAL = 0x01, 0x02
_MATCHING_FILES = ("/etc/netplan/*.yaml", "/etc/systemd/network/*", "/etc/udev/rules.d/*", "/etc/network/interfaces")
_MAX_FILE = 1 << 20


def after_fork(context: ActionContext) -> None:
    patterns = context.get(settings.MAC_INTERFACES)
    if not patterns:
        raise ActionSkipped("no interfaces are configured for this hook (Interfaces=)")
    if context.paths.is_fake:
        raise ActionSkipped("the network belongs to the machine around this root")
    with netlink.socket() as route:
        if not _chosen(route, patterns):
            raise ActionSkipped(f"no Ethernet interface is named {' or '.join(patterns)}")
    # DHCP clients ask their servers as soon as an interface has another address.
    spread.wait(context)
    dhcp_networkd.take_up_machine_id(context)
    with netlink.socket() as route:
        for link in _chosen(route, patterns):
            _renew(context, route, link)


def _chosen(route: Any, patterns: Sequence[str]) -> list[Link]:
    """The Ethernet interfaces that one of the patterns names."""
    return [
        link
        for link in netlink.links(route)
        if link.ethernet and any(fnmatch.fnmatchcase(link.name, pattern) for pattern in patterns)
    ]


def derived(template: str, token: bytes, name: str) -> str:
    """A template such as `52:54:00:%t` with the missing bytes made from the fork token and the interface's name.

    Raises ActionError unless that gives a unicast address. Without given bytes the address is locally administered.
    """
    head, placeholder, tail = template.strip().lower().partition("%t")
    given = [part for part in head.split(":") if part]
    if not placeholder or tail or len(given) > 5 or any(not re.fullmatch(r"[0-9a-f]{2}", part) for part in given):
        raise ActionError(f"{template!r} is no template for a MAC address", hint="write %t, or 52:54:00:%t")
    digest = hashlib.blake2b(token + name.encode(), digest_size=6, person=b"vmfork-mac").digest()
    address = bytearray(bytes.fromhex("".join(given)) + digest[len(given) :])
    if not given:
        address[0] = address[0] & ~_MULTICAST | _LOCAL
    return check_address(address.hex(":"))


def check_address(text: str) -> str:
    """The address in lower case; ActionError unless it is a unicast MAC address that is not all zero."""
    address = text.strip().lower()
    if not _MAC.fullmatch(address) or int(address[:2], 16) & _MULTICAST or address == "00:00:00:00:00:00":
        raise ActionError(f"{text!r} is no unicast MAC address")
    return address


def _renew(context: ActionContext, route: Any, link: Link) -> None:
    command = context.get(settings.MAC_COMMAND)
    if command:
        if context.would(f"give {link.name} the MAC address that {command[0]} prints (now {link.address})"):
            return
        told = context.run.check(*command, operand(link.name), environment=context.hook_environment())
        new = check_address(told.text)
    else:
        new = derived(context.get(settings.MAC_TEMPLATE), context.token, link.name)
    if new == link.address:
        context.say(f"{link.name} already has {new}")
        ipv6_eui64.ensure(context.paths, link.index, link.name)
        return
    if context.would(f"give {link.name} the MAC address {new} (now {link.address})"):
        return
    # First: killed after the change, this action would not know the old address any more.
    gone = ipv6_eui64.forget(link.index, link.address)
    try:
        was_down = netlink.set_address(route, link, new)
    finally:
        ipv6_eui64.ensure(context.paths, link.index, link.name)
    now = next((other.address for other in netlink.links(route) if other.index == link.index), "")
    if now != new:
        raise ActionError(f"{link.name}: has the MAC address {now or '(none)'} and not {new}")
    context.say(f"gave {link.name} the MAC address {new} (was {link.address})")
    if was_down:
        context.say(f"{link.name} was taken down for it: its routes come back with its lease or configuration")
    if gone:
        context.say(f"{link.name}: took away {', '.join(gone)}, which came from the old MAC address")
    for place in _places_with(context, link.address):
        context.say(f"{place} matches the old MAC address: the interface may be lost at the next boot")


def _places_with(context: ActionContext, old: str) -> list[str]:
    found = []
    for pattern in _MATCHING_FILES:
        for path in filter(os.path.isfile, sorted(glob.glob(context.paths.at(pattern)))):
            try:
                with open(path, encoding="utf-8", errors="replace") as file:
                    if old in file.read(_MAX_FILE).lower():
                        found.append(path)
            except OSError:
                continue
    return found


ACTION = Action(
    name="mac-address",
    hook="35-mac-address",
    summary="Give the configured network interfaces new MAC addresses.",
    identity=True,
    keys=(settings.MAC_INTERFACES, settings.MAC_TEMPLATE, settings.MAC_COMMAND),
    after_fork=after_fork,
)
