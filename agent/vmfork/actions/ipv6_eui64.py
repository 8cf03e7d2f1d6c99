# SPDX-License-Identifier: Apache-2.0
"""The IPv6 addresses that the kernel made from an interface's MAC address (EUI-64), when that address is another one.

The kernel keeps them as they are, so siblings would go on with the same ones. They are taken away; the link-local one
is made anew at once, and those that routers gave a prefix for come with the next advertisement, which the kernel asks
for by itself. What an admin has set stays, and so do addresses that were made otherwise.
"""

from __future__ import annotations

import errno
import os

from vmfork.actions import ipv6_dad, rawnetlink
from vmfork.actions.ipv6_dad import Address6
from vmfork.actions.rawnetlink import Channel
from vmfork.errors import ActionError
from vmfork.paths import Paths

_LINK_LOCAL = b"\xfe\x80" + bytes(6)
# /proc/sys/net/ipv6/conf/*/addr_gen_mode
_BY_EUI64, _BY_NOBODY = "0", "1"


def interface_identifier(mac: str) -> bytes:
    """The last 8 bytes of the addresses that come from a MAC address (RFC 4291, appendix A)."""
    raw = bytes.fromhex(mac.replace(":", ""))
    return bytes((raw[0] ^ 0x02,)) + raw[1:3] + b"\xff\xfe" + raw[3:]


def forget(index: int, mac: str) -> tuple[str, ...]:
    """Take away what came from a MAC address; the addresses that went. ActionError if one stays."""
    with Channel(rawnetlink.ROUTE) as channel:
        gone = [address for address in ipv6_dad.addresses(channel, index) if _is_from(address, mac)]
        for address in gone:
            (code,) = channel.ask(ipv6_dad.removal(address))
            if code not in (0, errno.EADDRNOTAVAIL):
                problem = os.strerror(code)
                raise ActionError(f"{address.text} came from the old MAC address and cannot be removed: {problem}")
    return tuple(address.text for address in gone)


def ensure(paths: Paths, index: int, name: str) -> None:
    """Have the kernel make a link-local address where there is none: it does when it is told how in other words.

    Where userspace makes them (mode "none", as NetworkManager has it), or IPv6 is off, nothing is done.
    """
    with Channel(rawnetlink.ROUTE) as channel:
        if any(address.own.startswith(_LINK_LOCAL) for address in ipv6_dad.addresses(channel, index)):
            return
    path = os.path.join(paths.ipv6_settings, name, "addr_gen_mode")
    try:
        with open(path, encoding="ascii") as file:
            if file.read(16).strip() != _BY_EUI64:
                return
        for mode in (_BY_NOBODY, _BY_EUI64):
            with open(path, "w", encoding="ascii") as file:
                file.write(mode)
    except FileNotFoundError:
        return
    except OSError as error:
        raise ActionError(f"{path}: cannot be set: {error.strerror}") from error


def _is_from(address: Address6, mac: str) -> bool:
    if address.prefix != 64 or address.own[8:] != interface_identifier(mac):
        return False
    return address.own.startswith(_LINK_LOCAL) or not address.is_permanent
