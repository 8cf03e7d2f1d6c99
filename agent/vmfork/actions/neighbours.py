# SPDX-License-Identifier: Apache-2.0
"""Tells the neighbours on each link who this machine is now, and forgets what it believed about them.

ARP and ND caches are flushed, every address is announced (gratuitous ARP, unsolicited NA), duplicate address detection
starts again for IPv6 without being waited for, and temporary addresses are renewed with it. Entries and interfaces that
resolve no addresses, and what an admin set permanently, are left alone.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Sequence

from vmfork.actions import ipv6_dad, netlink
from vmfork.actions.contract import Action, ActionContext
from vmfork.actions.netlink import Address, Link
from vmfork.errors import ActionError, ActionSkipped

_ETH_P_ARP = 0x0806
_BROADCAST = b"\xff" * 6
_ALL_NODES = "ff02::1"
_ARP_REQUEST, _ARP_REPLY = 1, 2
_NEIGHBOUR_ADVERTISEMENT = 136
_NA_OVERRIDE = 0x20000000
_TARGET_LINK_ADDRESS = 2


def after_fork(context: ActionContext) -> None:
    if context.paths.is_fake:
        raise ActionSkipped("the network belongs to the machine around this root")
    if context.early:
        raise ActionSkipped("the network comes up after this and announces itself")
    if not netlink.is_installed():
        raise ActionSkipped("python3-pyroute2 is not installed")
    with netlink.socket() as route:
        usable = [link for link in netlink.links(route) if link.up and link.carrier and link.neighbours]
        found = [(link, addresses) for link in usable if (addresses := netlink.addresses(route, link.index))]
        if not found:
            raise ActionSkipped("no interface with neighbours is up and has an address")
        for link, addresses in found:
            names = ", ".join(f"{address.text}/{address.prefix}" for address in addresses)
            if context.would(f"flush the neighbours of {link.name}, announce {names} and have them checked again"):
                continue
            context.say(f"{link.name}: forgot {netlink.flush_neighbours(route, link)} neighbours")
    problems: list[str] = []
    for link, addresses in found if not context.dry_run else ():
        try:
            _announce(context, link, addresses)
            _check_again(context, link)
        except ActionError as error:
            problems.append(f"{link.name}: {error}")
    if problems:
        raise ActionError("; ".join(problems))


def arp_packet(operation: int, hardware: bytes, address: bytes) -> bytes:
    """A gratuitous ARP frame: sender and target are the same IPv4 address."""
    head = struct.pack("!HHBBH", 1, 0x0800, 6, 4, operation)
    target = bytes(6) if operation == _ARP_REQUEST else hardware
    return _BROADCAST + hardware + struct.pack("!H", _ETH_P_ARP) + head + hardware + address + target + address


def advertisement(hardware: bytes, address: bytes) -> bytes:
    """An unsolicited neighbour advertisement that overrides; the kernel fills in the checksum."""
    option = struct.pack("!BB", _TARGET_LINK_ADDRESS, 1) + hardware
    return struct.pack("!BBHI", _NEIGHBOUR_ADVERTISEMENT, 0, 0, _NA_OVERRIDE) + address + option


def _announce(context: ActionContext, link: Link, addresses: Sequence[Address]) -> None:
    """Before detection starts again: an address that is being checked must not override (RFC 4429)."""
    if not link.ethernet:
        return
    hardware = bytes.fromhex(link.address.replace(":", ""))
    told: list[str] = []
    try:
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_CLOEXEC) as wire:
            wire.bind((link.name, _ETH_P_ARP))
            for address in (address for address in addresses if address.version == 4):
                # Some devices only heed requests, others only replies.
                for operation in (_ARP_REQUEST, _ARP_REPLY):
                    wire.send(arp_packet(operation, hardware, socket.inet_aton(address.text)))
                told.append(address.text)
        for address in (address for address in addresses if address.version == 6):
            if _advertise(link, hardware, address.text):
                told.append(address.text)
    except OSError as error:
        raise ActionError(f"cannot announce addresses: {error.strerror}") from error
    context.say(f"{link.name}: announced {', '.join(told) or 'nothing'}")


def _advertise(link: Link, hardware: bytes, address: str) -> bool:
    """One NA from the address that it is about; False where the kernel does not take it yet (tentative) or any more."""
    with socket.socket(socket.AF_INET6, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.IPPROTO_ICMPV6) as wire:
        wire.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_HOPS, 255)
        wire.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_IF, link.index)
        try:
            wire.bind((address, 0, 0, link.index))
        except OSError:
            return False
        packet = advertisement(hardware, socket.inet_pton(socket.AF_INET6, address))
        wire.sendto(packet, (_ALL_NODES, 0, 0, link.index))
    return True


def _check_again(context: ActionContext, link: Link) -> None:
    checked, refused = ipv6_dad.restart(context.paths, link.index, link.name)
    if checked:
        context.say(f"{link.name}: duplicate address detection runs again for {', '.join(checked)}")
    for sentence in refused:
        context.say(f"{link.name}: {sentence}")


ACTION = Action(
    name="neighbours",
    hook="45-neighbours",
    summary="Flush neighbour caches, announce the addresses, have IPv6 addresses checked for duplicates again.",
    after_fork=after_fork,
)
