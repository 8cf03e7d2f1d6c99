# SPDX-License-Identifier: Apache-2.0
"""A varlink client on one unix socket: blocking calls with a deadline, and replies without blocking for event loops.

One call at a time; not for use by several threads at once, nor by both sides of an os.fork(). Times are seconds. Once
a deadline has passed or the connection has ended, the client is closed. Imports nothing heavy: programs that merely
watch for forks pay for it.
"""

from __future__ import annotations

import errno
import select
import socket
import time

from vmfork.annotations import TYPE_CHECKING
from vmfork.errors import DaemonUnreachable, ProtocolError, VmforkError
from vmfork.varlink import framing
from vmfork.varlink.address import Reachable

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from typing import Self

    from vmfork.jsonfields import JsonObject, JsonValue

DEFAULT_TIMEOUT = 10.0

_READ_SIZE = 64 * 1024
_CONNECT_PAUSE = 0.005
_HINTS = {
    errno.ENOENT: "is vmforkd running? systemctl start vmforkd",
    errno.ECONNREFUSED: "vmforkd has ended: systemctl restart vmforkd",
    errno.EACCES: "this needs root",
    errno.EPERM: "this needs root",
}


class RemoteError(VmforkError):
    """The service answered with an error: `name` is its qualified name, `parameters` what came with it."""

    def __init__(self, method: str, name: str, parameters: JsonObject) -> None:
        said = parameters.get("message")
        super().__init__(f"{method}: {said}" if isinstance(said, str) else f"{method}: the service answered {name}")
        self.name = name
        self.parameters = parameters


class Overdue(DaemonUnreachable):
    """No answer within the time that the caller allowed."""


class Client:
    """A connection to a varlink service; a context manager that closes it."""

    __slots__ = ("_decoder", "_method", "_path", "_socket", "streaming", "timeout")

    def __init__(self, connected: socket.socket, path: str, *, timeout: float | None = DEFAULT_TIMEOUT) -> None:
        """For a socket that is connected already; see `connect`."""
        connected.settimeout(0)
        self.timeout = timeout
        self.streaming = False
        self._socket = connected
        self._path = path
        self._method = ""
        self._decoder = framing.Decoder(limit=framing.REPLY_LIMIT, place=path)

    @classmethod
    def connect(cls, path: str, *, timeout: float | None = DEFAULT_TIMEOUT) -> Self:
        """Connect to the socket at `path`, of any length; `timeout` (None: no limit) is also the default for calls.

        DaemonUnreachable, with a hint, if nobody listens there or it may not be used.
        """
        connected = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connected.settimeout(0)
        try:
            with Reachable(path) as address:
                _connect(connected, address, path, _deadline(timeout))
        except OSError as error:
            connected.close()
            raise DaemonUnreachable(
                f"cannot reach vmforkd at {path}: {error.strerror}", hint=_HINTS.get(error.errno or 0)
            ) from error
        except VmforkError:
            connected.close()
            raise
        return cls(connected, path, timeout=timeout)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    @property
    def closed(self) -> bool:
        return self._socket.fileno() < 0

    def fileno(self) -> int:
        """The socket, for select and friends: readable means that `receive` has something to say."""
        return self._socket.fileno()

    def close(self) -> None:
        self._socket.close()

    def call(
        self, method: str, parameters: Mapping[str, JsonValue] | None = None, *, timeout: float | None = None
    ) -> JsonObject:
        """Call and wait for the reply's parameters; `timeout` in place of the client's.

        RemoteError, Overdue, DaemonUnreachable when the connection ends, ProtocolError for nonsense.
        """
        deadline = _deadline(self.timeout if timeout is None else timeout)
        self._start(framing.encode_call(method, parameters), method, deadline, streaming=False)
        reply = self._wait(deadline)
        if self.streaming:
            raise self._broken("announced more replies than were asked for")
        return _parameters(reply)

    def send(
        self,
        method: str,
        parameters: Mapping[str, JsonValue] | None = None,
        *,
        more: bool = False,
        oneway: bool = False,
    ) -> None:
        """Send a call and do not wait: with `more`, replies come from `receive` or `replies`; with `oneway` none
        come, and it may be sent while a stream is open."""
        message = framing.encode_call(method, parameters, more=more, oneway=oneway)
        deadline = _deadline(self.timeout)
        if oneway:
            self._send(message, deadline)
        else:
            self._start(message, method, deadline, streaming=more)

    def stream(
        self, method: str, parameters: Mapping[str, JsonValue] | None = None, *, timeout: float | None = None
    ) -> Iterator[JsonObject]:
        """Call with `more`; the parameters of each reply until the last one. `timeout` is for the whole stream, and
        without it a stream may be silent for ever. Errors as for `call`."""
        self.send(method, parameters, more=True)
        return self.replies(timeout=timeout)

    def replies(self, *, timeout: float | None = None) -> Iterator[JsonObject]:
        """The parameters of the replies that are still to come to a call sent with `more`; `timeout` for them all."""
        deadline = _deadline(timeout)
        while self.streaming:
            yield _parameters(self._wait(deadline))

    def receive(self) -> JsonObject | None:
        """The next reply, None if none has arrived yet; never blocks.

        A reply is a dict of `parameters` (an object) and `continues` (whether another one follows). Several may have
        arrived at once, and select reports only bytes that were not read: call until None. Errors as for `call`.
        """
        while True:
            reply = self._next()
            if reply is not None:
                return reply
            if not self._read():
                return None

    def _start(self, message: bytes, method: str, deadline: float | None, *, streaming: bool) -> None:
        if self.streaming:
            raise ValueError(f"{self._method} still streams its replies on this connection")
        self._method = method
        self._send(message, deadline)
        self.streaming = streaming

    def _send(self, message: bytes, deadline: float | None) -> None:
        rest = memoryview(message)
        while rest:
            try:
                rest = rest[self._socket.send(rest) :]
            except BlockingIOError:
                self._await(select.POLLOUT, deadline)
            except (BrokenPipeError, ConnectionResetError):
                # A server that refuses a client says why before it hangs up: the answer is still there to be read.
                return
            except OSError as error:
                raise self._lost(error) from error

    def _wait(self, deadline: float | None) -> JsonObject:
        while True:
            reply = self._next()
            if reply is not None:
                return reply
            # A peer that never stops sending does not get beyond the deadline either.
            if not self._read() or (deadline is not None and time.monotonic() >= deadline):
                self._await(select.POLLIN, deadline)

    def _next(self) -> JsonObject | None:
        """The next reply among the bytes read so far; an error reply is raised."""
        try:
            message = self._decoder.take()
        except ProtocolError:
            self.close()
            raise
        if message is None:
            return None
        parameters = message.get("parameters")
        name = message.get("error")
        continues = message.get("continues", False)
        if parameters is None:
            parameters = {}
        if not isinstance(parameters, dict) or not isinstance(continues, bool):
            raise self._broken("sent something that is no reply")
        self.streaming = continues and name is None
        if isinstance(name, str):
            raise RemoteError(self._method, name, parameters)
        return {"parameters": parameters, "continues": continues}

    def _read(self) -> bool:
        """Read what is there; False if nothing is."""
        try:
            data = self._socket.recv(_READ_SIZE)
        except BlockingIOError:
            return False
        except OSError as error:
            raise self._lost(error) from error
        if not data:
            self.close()
            raise DaemonUnreachable(f"vmforkd at {self._path} ended the connection", hint="see: journalctl -u vmforkd")
        try:
            self._decoder.feed(data)
        except ProtocolError:
            self.close()
            raise
        return True

    def _await(self, event: int, deadline: float | None) -> None:
        poller = select.poll()
        poller.register(self._socket, event)
        if deadline is None:
            poller.poll()
            return
        left = deadline - time.monotonic()
        if left <= 0 or not poller.poll(max(1, int(left * 1000))):
            self.close()
            raise Overdue(f"vmforkd at {self._path} did not answer in time")

    def _lost(self, error: OSError) -> DaemonUnreachable:
        self.close()
        return DaemonUnreachable(f"lost vmforkd at {self._path}: {error.strerror}", hint="see: journalctl -u vmforkd")

    def _broken(self, problem: str) -> ProtocolError:
        self.close()
        return ProtocolError(self._path, problem)


def _deadline(timeout: float | None) -> float | None:
    return None if timeout is None else time.monotonic() + timeout


def _parameters(reply: JsonObject) -> JsonObject:
    parameters = reply["parameters"]
    assert isinstance(parameters, dict)
    return parameters


def _connect(connected: socket.socket, address: str, path: str, deadline: float | None) -> None:
    while True:
        try:
            connected.connect(address)
            return
        except BlockingIOError as error:
            # The queue of the listening socket is full, and a unix socket cannot be polled for a place in it.
            if deadline is not None and time.monotonic() >= deadline:
                raise Overdue(f"vmforkd at {path} is too busy to answer") from error
        time.sleep(_CONNECT_PAUSE)
