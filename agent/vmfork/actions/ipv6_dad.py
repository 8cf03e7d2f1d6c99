# SPDX-License-Identifier: Apache-2.0
"""Starts duplicate address detection again for the IPv6 addresses of an interface, without waiting for its end.

The kernel has no request for it: only an address that is added is checked. So each one is deleted and added in one
send (a kill cannot fall in between), with its flags, lifetimes and metric, and with the routes whose preferred source
it is. It is optimistic (RFC 4429) meanwhile: packets are taken, connections go on, only unknown neighbours are not yet
asked for. The temporary addresses that the kernel made from it go with it, and new random ones come.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from vmfork.actions import rawnetlink
from vmfork.actions.rawnetlink import Channel, Request, attribute, attributes
from vmfork.errors import ActionError
from vmfork.paths import Paths

_NEWADDR, _DELADDR, _GETADDR = 20, 21, 22
_NEWROUTE, _GETROUTE = 24, 26
_IFADDRMSG = struct.Struct("=BBBBI")
_RTMSG = struct.Struct("=BBBBBBBBI")
_IFA_ADDRESS, _IFA_LOCAL, _IFA_CACHEINFO, _IFA_FLAGS, _IFA_RT_PRIORITY, _IFA_PROTO = 1, 2, 6, 8, 9, 11
_RTA_PREFSRC, _RTA_CACHEINFO = 7, 12
_RTM_F_CLONED = 0x200

# include/uapi/linux/if_addr.h
_TEMPORARY, _NODAD, _OPTIMISTIC, _DADFAILED, _TENTATIVE = 0x01, 0x02, 0x04, 0x08, 0x40
_PERMANENT = 0x80
_HOMEADDRESS, _MANAGETEMPADDR, _NOPREFIXROUTE, _MCAUTOJOIN = 0x10, 0x100, 0x200, 0x400
_KEPT_FLAGS = _HOMEADDRESS | _MANAGETEMPADDR | _NOPREFIXROUTE | _MCAUTOJOIN
TEMPORARY, UNSETTLED = _TEMPORARY, _TENTATIVE | _DADFAILED


@dataclass(frozen=True, slots=True, kw_only=True)
class Address6:
    """One IPv6 address as the kernel lists it."""

    index: int
    prefix: int
    scope: int
    flags: int
    attributes: dict[int, bytes]

    @property
    def own(self) -> bytes:
        """The address itself, 16 bytes; with a peer, IFA_ADDRESS is the peer's."""
        return self.attributes.get(_IFA_LOCAL) or self.attributes.get(_IFA_ADDRESS, bytes(16))

    @property
    def text(self) -> str:
        return socket.inet_ntop(socket.AF_INET6, self.own)

    @property
    def is_permanent(self) -> bool:
        """Whether it has no lifetime: set by an admin, or link-local."""
        return bool(self.flags & _PERMANENT)

    def is_checked(self) -> bool:
        """Whether to check it: not while that goes on, and temporary addresses come with their parent."""
        return not self.flags & (_TEMPORARY | _NODAD) and (not self.flags & _TENTATIVE or bool(self.flags & _DADFAILED))


def addresses(channel: Channel, index: int) -> tuple[Address6, ...]:
    """The IPv6 addresses of one interface."""
    found = []
    for body in channel.dump(Request(type=_GETADDR, body=_IFADDRMSG.pack(socket.AF_INET6, 0, 0, 0, 0))):
        family, prefix, flags, scope, of = _IFADDRMSG.unpack_from(body)
        if family != socket.AF_INET6 or of != index:
            continue
        values = attributes(body[_IFADDRMSG.size :])
        if len(values.get(_IFA_FLAGS, b"")) == 4:
            flags = struct.unpack("=I", values[_IFA_FLAGS])[0]
        if len(values.get(_IFA_ADDRESS, b"")) == 16:
            found.append(Address6(index=of, prefix=prefix, scope=scope, flags=flags, attributes=values))
    return tuple(found)


def removal(address: Address6) -> Request:
    """The message that takes an address off its interface."""
    head = _IFADDRMSG.pack(socket.AF_INET6, address.prefix, 0, address.scope, address.index)
    own = attribute(_IFA_LOCAL, address.own) + attribute(_IFA_ADDRESS, address.own)
    return Request(type=_DELADDR, body=head + own)


def restart(paths: Paths, index: int, name: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Start detection again on one interface; the addresses that are checked now, and sentences about the others.

    ActionError where an address was taken away and could not be given back.
    """
    checked: list[str] = []
    refused: list[str] = []
    with Channel(rawnetlink.ROUTE) as channel, _optimistic_allowed(paths, name) as optimistic:
        wanted = [address for address in addresses(channel, index) if address.is_checked()]
        routes = _routes(channel) if wanted else []
        for address in wanted:
            sourced = [body for body, source in routes if source == address.own]
            if sourced and not optimistic:
                # The kernel takes no preferred source that is still being checked, so these routes would lose it.
                refused.append(f"{address.text} is left as it is: routes prefer it, and {name} forwards")
                continue
            _swap(channel, address, sourced, optimistic=optimistic)
            checked.append(address.text)
    return tuple(checked), tuple(refused)


def _swap(channel: Channel, address: Address6, routes: Sequence[bytes], *, optimistic: bool) -> None:
    kept = (_IFA_ADDRESS, _IFA_LOCAL, _IFA_CACHEINFO, _IFA_RT_PRIORITY, _IFA_PROTO)
    flags = address.flags & _KEPT_FLAGS | (_OPTIMISTIC if optimistic else 0)
    head = _IFADDRMSG.pack(socket.AF_INET6, address.prefix, flags & 0xFF, address.scope, address.index)
    values = b"".join(attribute(kind, address.attributes[kind]) for kind in kept if kind in address.attributes)
    add = head + values + attribute(_IFA_FLAGS, struct.pack("=I", flags))
    gone, back, *restored = channel.ask(
        removal(address),
        Request(type=_NEWADDR, flags=rawnetlink.F_CREATE | rawnetlink.F_EXCL, body=add),
        *(Request(type=_NEWROUTE, flags=rawnetlink.F_CREATE | rawnetlink.F_REPLACE, body=body) for body in routes),
    )
    if gone in (errno.EPERM, errno.EACCES):
        raise ActionError(f"{address.text} cannot be checked again", hint="run as root with CAP_NET_ADMIN")
    if gone == 0 and back not in (0, errno.EEXIST):
        raise ActionError(f"{address.text} was taken away and could not be given back: {os.strerror(back)}")
    if any(restored):
        raise ActionError(f"a route lost its preferred source {address.text}: {os.strerror(max(restored))}")


def _routes(channel: Channel) -> list[tuple[bytes, bytes]]:
    """IPv6 routes with a preferred source: the message to add each again, and that source."""
    found = []
    for body in channel.dump(Request(type=_GETROUTE, body=_RTMSG.pack(socket.AF_INET6, 0, 0, 0, 0, 0, 0, 0, 0))):
        values = attributes(body[_RTMSG.size :])
        flags = _RTMSG.unpack_from(body)[8]
        if _RTA_PREFSRC in values and not flags & _RTM_F_CLONED:
            again = b"".join(attribute(kind, value) for kind, value in values.items() if kind != _RTA_CACHEINFO)
            found.append((body[: _RTMSG.size - 4] + bytes(4) + again, values[_RTA_PREFSRC]))
    return found


@contextlib.contextmanager
def _optimistic_allowed(paths: Paths, name: str) -> Iterator[bool]:
    """Allow optimistic addresses on an interface while they are added; whether they are: not on a router (RFC 4429)."""
    path = os.path.join(paths.ipv6_settings, name, "optimistic_dad")
    try:
        before = _read(path)
        forwards = _read(os.path.join(paths.ipv6_settings, name, "forwarding")) != "0"
        if not forwards:
            _write(path, "1")
    except OSError:
        # A kernel without CONFIG_IPV6_OPTIMISTIC_DAD.
        yield False
        return
    try:
        yield not forwards
    finally:
        if not forwards:
            with contextlib.suppress(OSError):
                _write(path, before)


def _read(path: str) -> str:
    with open(path, encoding="ascii") as file:
        return file.read(16).strip()


def _write(path: str, value: str) -> None:
    with open(path, "w", encoding="ascii") as file:
        file.write(value)
