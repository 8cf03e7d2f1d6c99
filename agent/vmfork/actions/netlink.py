# SPDX-License-Identifier: Apache-2.0
"""The kernel's network interfaces by rtnetlink. The only module that imports pyroute2, and only inside functions.

Attributes are read with get_attr and dumps are copied into lists, since pyroute2 0.7 to 0.9 differ in both.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from vmfork.errors import ActionError

_ARPHRD_ETHER = 1
_IFF_UP = 1
_IFF_LOOPBACK = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """One network interface: its index, name, MAC address (lower case, with colons), whether it is up, and its kind.

    `kind` is that of a virtual device ("bridge", "veth", ...), empty for a device with hardware of its own.
    """

    index: int
    name: str
    address: str
    up: bool
    ethernet: bool
    kind: str = ""


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
