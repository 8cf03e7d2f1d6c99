# SPDX-License-Identifier: Apache-2.0
"""The kernel's table of tracked connections, by ctnetlink: list and delete entries. conntrack-tools are not needed."""

from __future__ import annotations

import errno
import os
import struct
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address

from vmfork.actions import rawnetlink
from vmfork.actions.rawnetlink import Channel, Request, attribute, attributes
from vmfork.errors import ActionError

_GET, _DELETE = 1 << 8 | 1, 1 << 8 | 2
_NFGENMSG = struct.Struct("!BBH")
_TUPLE_ORIG, _ID, _ZONE = 1, 12, 18
_TUPLE_IP, _TUPLE_PROTO = 1, 2
_IP_FIELDS = (1, 2, 3, 4)
_SOURCE_PORT, _TARGET_PORT = 2, 3
_NESTED = 0x8000


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One tracked connection, as its first packet had it; ports are empty for protocols without."""

    family: int
    addresses: tuple[IPv4Address | IPv6Address, ...]
    ports: tuple[int, ...]
    identity: bytes


def entries(channel: Channel) -> tuple[Entry, ...]:
    """Everything that is tracked in this network namespace."""
    try:
        listed = channel.dump(Request(type=_GET, body=_NFGENMSG.pack(0, 0, 0)))
    except OSError as error:
        raise ActionError(f"the kernel does not list tracked connections: {error.strerror}") from error
    return tuple(entry for body in listed if (entry := _parse(body)) is not None)


def delete(channel: Channel, entry: Entry) -> bool:
    """Forget one entry; False if it had ended by itself."""
    body = _NFGENMSG.pack(entry.family, 0, 0) + entry.identity
    (code,) = channel.ask(Request(type=_DELETE, body=body))
    if code not in (0, errno.ENOENT):
        raise ActionError(f"cannot delete a tracked connection: {os.strerror(code)}")
    return code == 0


def _parse(body: bytes) -> Entry | None:
    if len(body) < _NFGENMSG.size:
        return None
    values = attributes(body[_NFGENMSG.size :])
    origin = attributes(values.get(_TUPLE_ORIG, b""))
    ip, ports = attributes(origin.get(_TUPLE_IP, b"")), attributes(origin.get(_TUPLE_PROTO, b""))
    identity = attribute(_TUPLE_ORIG | _NESTED, values.get(_TUPLE_ORIG, b""))
    identity += b"".join(attribute(kind, values[kind]) for kind in (_ID, _ZONE) if kind in values)
    return Entry(
        family=body[0],
        addresses=tuple(ip_address(ip[kind]) for kind in _IP_FIELDS if len(ip.get(kind, b"")) in (4, 16)),
        ports=tuple(
            struct.unpack("!H", ports[kind])[0]
            for kind in (_SOURCE_PORT, _TARGET_PORT)
            if len(ports.get(kind, b"")) == 2
        ),
        identity=identity,
    )


def open_channel() -> Channel:
    """A channel to ctnetlink."""
    return Channel(rawnetlink.NETFILTER)
