# SPDX-License-Identifier: Apache-2.0
"""The kernel's network interfaces by rtnetlink. The only module that imports pyroute2, and only inside functions.

Attributes are read with get_attr and dumps are copied into lists, since pyroute2 0.7 to 0.9 differ in both.
"""

from __future__ import annotations

import errno
import importlib.util
import socket as sockets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from vmfork.annotations import Any
from vmfork.errors import ActionError

_ARPHRD_ETHER = 1
_IFF_UP = 1
_IFF_LOOPBACK = 8
_IFF_POINTOPOINT = 0x10
_IFF_NOARP = 0x80
_IFF_LOWER_UP = 0x10000
_NUD_NOARP, _NUD_PERMANENT = 0x40, 0x80
_IFA_F_PERMANENT = 0x80


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """One network interface: its index, name, MAC address (lower case, with colons), whether it is up, and its kind.

    `kind` is that of a virtual device ("bridge", "veth", ...), empty for a device with hardware of its own. `carrier`:
    packets can leave; `neighbours`: it resolves addresses: no point-to-point link, no NOARP.
    """

    index: int
    name: str
    address: str
    up: bool
    ethernet: bool
    kind: str = ""
    carrier: bool = False
    neighbours: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """One IP address of an interface. `permanent`: it has no lifetime, so no lease; `updated` is when it was last set,
    in hundredths of a second of this boot."""

    index: int
    text: str
    prefix: int
    version: int
    permanent: bool
    updated: int


def is_installed() -> bool:
    """Whether pyroute2 is there, without paying for its import."""
    return importlib.util.find_spec("pyroute2") is not None


@contextmanager
def socket() -> Iterator[Any]:
    """An open rtnetlink socket (pyroute2.IPRoute). ActionError without pyroute2; a refusal of the kernel within the
    block becomes an ActionError too."""
    try:
        from pyroute2 import IPRoute
        from pyroute2.netlink.exceptions import NetlinkError
    except ImportError as error:
        raise ActionError("pyroute2 is not installed", hint="apt-get install python3-pyroute2") from error
    try:
        with IPRoute() as route:
            yield route
    except NetlinkError as error:
        hint = "run as root with CAP_NET_ADMIN" if error.code in (errno.EPERM, errno.EACCES) else None
        raise ActionError(f"the kernel's network side refused: {error}", hint=hint) from error


def links(route: Any) -> tuple[Link, ...]:
    """Every interface except the loopback."""
    found = []
    for message in list(route.get_links()):
        if message["flags"] & _IFF_LOOPBACK:
            continue
        info = message.get_attr("IFLA_LINKINFO")
        found.append(
            Link(
                index=message["index"],
                name=message.get_attr("IFLA_IFNAME") or "",
                address=(message.get_attr("IFLA_ADDRESS") or "").lower(),
                up=bool(message["flags"] & _IFF_UP),
                ethernet=message["ifi_type"] == _ARPHRD_ETHER,
                kind=(info.get_attr("IFLA_INFO_KIND") or "") if info is not None else "",
                carrier=bool(message["flags"] & _IFF_LOWER_UP),
                neighbours=not message["flags"] & (_IFF_POINTOPOINT | _IFF_NOARP),
            )
        )
    return tuple(found)


def set_address(route: Any, link: Link, address: str) -> bool:
    """Set a MAC address, live where the driver can, else with the link taken down in between; True in that case."""
    from pyroute2.netlink.exceptions import NetlinkError

    try:
        route.link("set", index=link.index, address=address)
    except NetlinkError as error:
        if error.code != errno.EBUSY:
            raise
    else:
        return False
    route.link("set", index=link.index, state="down")
    try:
        route.link("set", index=link.index, address=address)
    finally:
        if link.up:
            route.link("set", index=link.index, state="up")
    return True


def addresses(route: Any, index: int) -> tuple[Address, ...]:
    """The IP addresses of one interface, of both families."""
    found = []
    for message in list(route.get_addr(index=index)):
        # With a peer, IFA_ADDRESS is the peer's.
        text = message.get_attr("IFA_LOCAL") or message.get_attr("IFA_ADDRESS")
        if message["index"] != index or not text:
            continue
        flags, times = message.get_attr("IFA_FLAGS"), message.get_attr("IFA_CACHEINFO")
        found.append(
            Address(
                index=index,
                text=str(text),
                prefix=message["prefixlen"],
                version=6 if message["family"] == sockets.AF_INET6 else 4,
                permanent=bool((message["flags"] if flags is None else flags) & _IFA_F_PERMANENT),
                updated=times["tstamp"] if times is not None else 0,
            )
        )
    return tuple(found)


def remove_address(route: Any, address: Address) -> None:
    """Take an address off its interface; one that is gone already is fine."""
    from pyroute2.netlink.exceptions import NetlinkError

    try:
        route.addr("del", index=address.index, address=address.text, prefixlen=address.prefix)
    except NetlinkError as error:
        if error.code not in (errno.EADDRNOTAVAIL, errno.ENODEV):
            raise


def flush_neighbours(route: Any, link: Link) -> int:
    """Forget what was learned about the neighbours on a link, ARP and ND; how many. What an admin set stays."""
    from pyroute2.netlink.exceptions import NetlinkError

    gone = 0
    for family in (sockets.AF_INET, sockets.AF_INET6):
        for entry in list(route.get_neighbours(family=family)):
            target = entry.get_attr("NDA_DST")
            if entry["ifindex"] != link.index or entry["state"] & (_NUD_NOARP | _NUD_PERMANENT) or not target:
                continue
            try:
                route.neigh("del", dst=target, ifindex=link.index, family=family)
            except NetlinkError as error:
                if error.code not in (errno.ENOENT, errno.ESRCH):
                    raise
            gone += 1
    return gone


def wireguard_public_key(name: str) -> str:
    """The public key of a WireGuard interface in base64, as the kernel computed it; empty without a private key."""
    with _wireguard() as guard:
        for message in list(guard.info(name)):
            key = message.get_attr("WGDEVICE_A_PUBLIC_KEY")
            if key:
                return key.decode() if isinstance(key, bytes) else str(key)
    return ""


def set_wireguard_key(name: str, private_key: str) -> None:
    """Give a WireGuard interface a private key (base64)."""
    with _wireguard() as guard:
        guard.set(name, private_key=private_key)


@contextmanager
def _wireguard() -> Iterator[Any]:
    """An open WireGuard control socket; its errors never carry what was sent."""
    try:
        from pyroute2 import WireGuard
        from pyroute2.netlink.exceptions import NetlinkError
    except ImportError as error:
        raise ActionError("pyroute2 is not installed", hint="apt-get install python3-pyroute2") from error
    try:
        with WireGuard() as guard:
            yield guard
    except NetlinkError as error:
        raise ActionError(f"the kernel's WireGuard refused: error {error.code}") from None
