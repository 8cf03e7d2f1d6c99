# SPDX-License-Identifier: Apache-2.0
"""Many varlink subscribers in one process, and how long it takes until the last of them was told."""

from __future__ import annotations

import json
import os
import re
import resource
import select
import socket
import struct
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

from support.privilege import acting_as
from vmfork.varlink.address import Reachable

PATIENCE_SEC = 20.0
_NOTICE = re.compile(rb'"notice":"([a-z-]+)","generation":(\d+)')


def connected(path: str) -> socket.socket:
    """A client's end of the socket at `path`, which may be deep below a root."""
    client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    # A time-out of Python's own would make connect() fail where the server has not accepted those before it.
    client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("@ll", int(PATIENCE_SEC), 0))
    with Reachable(path) as address:
        client.connect(address)
    client.settimeout(PATIENCE_SEC)
    return client


def is_hung_up(client: socket.socket) -> bool:
    """Whether the other side has closed, whatever is left to read."""
    poll = select.poll()
    poll.register(client, 0)
    return any(mask & select.POLLHUP for _, mask in poll.poll(0))


def connected_as(uid: int, path: str) -> socket.socket:
    """A client's end that the server knows as this user's, who need not be able to reach the socket's directory."""
    directory, name = os.path.split(path)
    reached = os.open(directory, os.O_PATH | os.O_DIRECTORY)
    try:
        with acting_as(uid):
            return connected(f"/proc/self/fd/{reached}/{name}")
    finally:
        os.close(reached)


def call(method: str, *, more: bool = False, **parameters: object) -> bytes:
    """One call as it goes over the socket."""
    return json.dumps({"method": f"io.vmfork.{method}", "parameters": parameters, "more": more}).encode() + b"\0"


@contextmanager
def descriptors(soft: int) -> Iterator[None]:
    """Inside, this process and those that it starts have this soft limit."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, before[1]), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


class Crowd:
    """`count` subscribers that have been greeted; leaving the `with` disconnects them."""

    def __init__(self, path: str, count: int, *, generation: int = 1) -> None:
        self.clients: list[socket.socket] = []
        self._poll = select.epoll()
        self._seen: Counter[tuple[str, int]] = Counter()
        self._buffers: dict[int, bytearray] = {}
        self._sockets: dict[int, socket.socket] = {}
        for _ in range(count):
            client = connected(path)
            client.sendall(call("Subscribe", more=True))
            client.settimeout(0)
            self.clients.append(client)
            self._buffers[client.fileno()] = bytearray()
            self._sockets[client.fileno()] = client
            self._poll.register(client, select.EPOLLIN)
        self.await_notice("hello", generation=generation)

    def __enter__(self) -> Crowd:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for client in self.clients:
            client.close()
        self._poll.close()

    def await_notice(self, notice: str, *, generation: int) -> float:
        """When the last one had this notice of this generation, in seconds of time.monotonic()."""
        end = time.monotonic() + PATIENCE_SEC
        while missing := len(self.clients) - self._seen[notice, generation]:
            assert time.monotonic() < end, f"{missing} of {len(self.clients)} were not told of {notice} {generation}"
            for descriptor, _ in self._poll.poll(1.0, 256):
                self._take(descriptor)
        return time.monotonic()

    def _take(self, descriptor: int) -> None:
        data = self._sockets[descriptor].recv(65536)
        assert data, "a subscriber was dropped"
        buffer = self._buffers[descriptor]
        buffer += data
        while (end := buffer.find(b"\0")) >= 0:
            # Parsing JSON a thousand times would be most of what is measured.
            found = _NOTICE.search(buffer, 0, end)
            assert found, bytes(buffer[:200])
            self._seen[found[1].decode(), int(found[2])] += 1
            del buffer[: end + 1]
