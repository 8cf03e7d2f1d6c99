# SPDX-License-Identifier: Apache-2.0
"""Netlink messages by hand, for what pyroute2 does not offer in all its versions: several requests in one send.

The kernel works through one send without returning to this process, so a kill cannot fall between its requests. Only
framing is here; the callers know the families. Every wait is bounded.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType

from vmfork.errors import ActionError

ROUTE, SOCK_DIAG, NETFILTER = 0, 4, 12
F_REQUEST, F_ACK, F_DUMP = 0x1, 0x4, 0x300
F_REPLACE, F_EXCL, F_CREATE = 0x100, 0x200, 0x400
_NOOP, _ERROR, _DONE = 1, 2, 3
_HEADER = struct.Struct("=IHHII")
_ATTRIBUTE = struct.Struct("=HH")
_TYPE_MASK = 0x3FFF
_BUFFER = 1 << 20
_TIMEOUT_SEC = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One message to the kernel: type, flags beside REQUEST and ACK, and everything after the netlink header."""

    type: int
    flags: int = 0
    body: bytes


class Channel:
    """A netlink socket of one protocol; use it in a `with`. ActionError where the kernel does not have it."""

    def __init__(self, protocol: int) -> None:
        try:
            self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol)
        except OSError as error:
            raise ActionError(f"netlink protocol {protocol} is not available: {error.strerror}") from error
        self._socket.settimeout(_TIMEOUT_SEC)
        self._sequence = 0

    def __enter__(self) -> Channel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.close()

    def ask(self, *requests: Request) -> tuple[int, ...]:
        """Send all requests at once; the errno of each, 0 for success, in the same order."""
        first = self._sequence + 1
        data = b"".join(self._frame(request, F_ACK) for request in requests)
        self._socket.send(data)
        codes: dict[int, int] = {}
        while len(codes) < len(requests):
            for kind, sequence, body in self._receive():
                if kind == _ERROR and len(body) >= 4 and sequence >= first:
                    codes[sequence] = -int(struct.unpack_from("=i", body)[0])
        return tuple(codes[first + index] for index in range(len(requests)))

    def dump(self, request: Request) -> list[bytes]:
        """Everything that the kernel lists; the bodies. OSError with its errno where it refuses."""
        self._socket.send(self._frame(request, F_DUMP))
        found: list[bytes] = []
        while True:
            for kind, sequence, body in self._receive():
                if sequence != self._sequence or kind == _NOOP:
                    continue
                if kind == _DONE:
                    return found
                if kind == _ERROR:
                    code = -int(struct.unpack_from("=i", body)[0]) if len(body) >= 4 else errno.EPROTO
                    raise OSError(code, os.strerror(code))
                found.append(body)

    def _frame(self, request: Request, flags: int) -> bytes:
        self._sequence += 1
        length = _HEADER.size + len(request.body)
        header = _HEADER.pack(length, request.type, F_REQUEST | flags | request.flags, self._sequence, 0)
        return header + request.body + bytes(-length % 4)

    def _receive(self) -> Iterator[tuple[int, int, bytes]]:
        try:
            data = self._socket.recv(_BUFFER)
        except TimeoutError as error:
            raise ActionError("the kernel does not answer on netlink") from error
        position = 0
        while position + _HEADER.size <= len(data):
            length, kind, _, sequence, _ = _HEADER.unpack_from(data, position)
            if length < _HEADER.size:
                return
            yield kind, sequence, data[position + _HEADER.size : position + length]
            position += (length + 3) & ~3


def attribute(kind: int, value: bytes) -> bytes:
    """One attribute, padded."""
    return _ATTRIBUTE.pack(_ATTRIBUTE.size + len(value), kind) + value + bytes(-len(value) % 4)


def attributes(data: bytes) -> dict[int, bytes]:
    """Attributes by type, without the flags for nesting and byte order; what is cut off is left out."""
    found: dict[int, bytes] = {}
    position = 0
    while position + _ATTRIBUTE.size <= len(data):
        length, kind = _ATTRIBUTE.unpack_from(data, position)
        if length < _ATTRIBUTE.size or position + length > len(data):
            break
        found[kind & _TYPE_MASK] = data[position + _ATTRIBUTE.size : position + length]
        position += (length + 3) & ~3
    return found
