# SPDX-License-Identifier: Apache-2.0
"""The kernel's TCP connections, by sock_diag: list and destroy them. Listening sockets are not looked at.

Only the network namespace of this process is seen. ActionError where the kernel cannot destroy sockets
(CONFIG_INET_DIAG_DESTROY).
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address

from vmfork.actions.rawnetlink import Channel, Request
from vmfork.errors import ActionError

_BY_FAMILY, _DESTROY = 20, 21
_REQUEST = struct.Struct("=BBBBI48s")
_MESSAGE = struct.Struct("=BBBB48s")
_ID = struct.Struct("!HH16s16s")
# include/net/tcp_states.h; without TIME_WAIT (6), CLOSE (7) and LISTEN (10), which carry no data any more or yet.
_STATES = sum(1 << state for state in (1, 2, 3, 4, 5, 8, 9, 11, 12))


@dataclass(frozen=True, slots=True, kw_only=True)
class Connection:
    """One TCP connection; `identity` is the kernel's socket ID with its cookie, which is never used twice."""

    family: int
    local: IPv4Address | IPv6Address
    local_port: int
    remote: IPv4Address | IPv6Address
    remote_port: int
    identity: bytes

    @property
    def is_local(self) -> bool:
        """Both ends are on this machine."""
        return self.local.is_loopback or self.remote.is_loopback or self.local == self.remote

    def __str__(self) -> str:
        return f"[{self.local}]:{self.local_port} to [{self.remote}]:{self.remote_port}"


def connections(channel: Channel) -> tuple[Connection, ...]:
    """Every TCP connection of this network namespace."""
    found = []
    for family in (socket.AF_INET, socket.AF_INET6):
        body = _REQUEST.pack(family, socket.IPPROTO_TCP, 0, 0, _STATES, bytes(48))
        try:
            listed = channel.dump(Request(type=_BY_FAMILY, body=body))
        except OSError as error:
            if error.errno == errno.ENOENT and family == socket.AF_INET6:
                continue  # A kernel without IPv6.
            raise ActionError(f"the kernel does not list TCP connections: {error.strerror}") from error
        found += [_parse(message) for message in listed]
    return tuple(connection for connection in found if connection is not None)


def destroy(channel: Channel, connection: Connection) -> bool:
    """End a connection, with a reset to its peer; False if it had ended by itself."""
    body = _REQUEST.pack(connection.family, socket.IPPROTO_TCP, 0, 0, 0xFFFFFFFF, connection.identity)
    (code,) = channel.ask(Request(type=_DESTROY, body=body))
    if code in (errno.EOPNOTSUPP, errno.EINVAL):
        raise ActionError(
            "this kernel cannot destroy connections", hint="it needs CONFIG_INET_DIAG_DESTROY; restart the programs"
        )
    if code not in (0, errno.ENOENT):
        raise ActionError(f"cannot destroy {connection}: {os.strerror(code)}", hint="run as root with CAP_NET_ADMIN")
    return code == 0


def _parse(body: bytes) -> Connection | None:
    if len(body) < _MESSAGE.size:
        return None
    family, _, _, _, identity = _MESSAGE.unpack_from(body)
    local_port, remote_port, local, remote = _ID.unpack_from(identity)
    length = 4 if family == socket.AF_INET else 16
    return Connection(
        family=family,
        local=_address(local[:length]),
        local_port=local_port,
        remote=_address(remote[:length]),
        remote_port=remote_port,
        identity=identity,
    )


def _address(raw: bytes) -> IPv4Address | IPv6Address:
    address = ip_address(raw)
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return mapped or address
