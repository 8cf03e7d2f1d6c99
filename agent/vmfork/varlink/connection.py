# SPDX-License-Identifier: Apache-2.0
"""One client of a varlink server: reads its calls, queues the answers, and holds it to the limits.

Never blocks. Calls are run one after the other and answered in order; a client that does not read its answers is not
read from either, and is dropped when what waits for it exceeds its queue. Broken input drops the connection.
"""

from __future__ import annotations

import logging
import selectors
import socket
from collections import deque
from collections.abc import Callable

from vmfork.annotations import Any, Protocol
from vmfork.errors import ProtocolError
from vmfork.varlink.call import Call, Peer
from vmfork.varlink.framing import Decoder
from vmfork.varlink.shares import Limits

log = logging.getLogger(__name__)

_READ_SIZE = 16 * 1024
_SEND_BUFFER = 32 * 1024


class Selector(Protocol):
    """What calls `data(mask)` for a socket that is ready: a loop, or a selector of `selectors` behind one."""

    def register(self, fileobj: socket.socket, events: int, data: Any, /) -> object: ...

    def modify(self, fileobj: socket.socket, events: int, data: Any, /) -> object: ...

    def unregister(self, fileobj: socket.socket, /) -> object: ...


class Owner(Protocol):
    """What a connection needs of its server."""

    @property
    def limits(self) -> Limits: ...

    @property
    def selector(self) -> Selector: ...

    def runs_beside_stream(self, method: str) -> bool: ...

    def dispatch(self, call: Call) -> None: ...

    def charge(self, connection: Connection, amount: int) -> bool: ...

    def forget(self, connection: Connection) -> None: ...


class Connection:
    """One connected client. `on_close` is called once, when the connection has ended for whatever reason."""

    __slots__ = (
        "_calls",
        "_decoder",
        "_interest",
        "_output",
        "_owner",
        "_queued",
        "_sent",
        "_socket",
        "_waits",
        "charged",
        "closed",
        "on_close",
        "peer",
    )

    def __init__(self, sock: socket.socket, peer: Peer, owner: Owner) -> None:
        sock.settimeout(0)
        # What the kernel holds for a client that does not read is charged to the server's control group.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)
        self.peer = peer
        self.closed = False
        self.charged = 0
        self.on_close: Callable[[], None] | None = None
        self._owner = owner
        self._socket = sock
        self._decoder = Decoder(limit=owner.limits.message, place=f"varlink peer {peer.pid}")
        self._calls: deque[Call] = deque()
        self._waits = False  # what is first in _decoder, for the end of _calls
        self._output: deque[memoryview] = deque()
        self._sent = 0  # of the first in _output
        self._queued = 0
        self._interest = selectors.EVENT_READ
        owner.selector.register(sock, self._interest, self._ready)

    def send_encoded(self, message: bytes) -> None:
        """Send a reply with `continues`, encoded once for many streams. May close the connection, and so call
        `on_close`: iterate over a copy of the subscribers."""
        self._send(message)
        self._settle()

    def close(self, reason: str) -> None:
        """End the connection at once; calls in progress stay unanswered."""
        if self.closed:
            return
        self.closed = True
        log.debug("varlink peer %d (uid %d): %s", self.peer.pid, self.peer.uid, reason)
        self._owner.selector.unregister(self._socket)
        self._socket.close()
        calls, self._calls = self._calls, deque()
        self._output.clear()
        self._decoder.clear()
        self._owner.forget(self)
        for call in calls:
            if not call.finished and call.on_abandoned is not None:
                call.on_abandoned()
        on_close, self.on_close = self.on_close, None
        if on_close is not None:
            on_close()

    def deliver(self, call: Call, message: bytes | memoryview, *, final: bool) -> None:
        """For Call: send this answer now, or hold it until the calls before it are answered."""
        if self._calls[0] is call:
            self._send(message)
        else:
            call.held += message
            self._queued += len(message)
            if self._queued > self._owner.limits.queue:
                self.close("makes too many calls beside a stream")
        if final:
            self._merge()
            self._release()
        self._settle()

    def _merge(self) -> None:
        """Of answered calls behind a stream only the answers are kept, in the call before: they have 18 bytes each and
        are charged as such, where a call takes 700, and a stream may last as long as its client."""
        if len(self._calls) > 2 and self._calls[-1].finished and self._calls[-2].finished:
            answered = self._calls.pop()
            self._calls[-1].held += answered.held

    def _release(self) -> None:
        """Forget answered calls at the front, and send what was held behind them."""
        while self._calls and self._calls[0].finished:
            self._calls.popleft()
            if self._calls and self._calls[0].held:
                held, self._calls[0].held = self._calls[0].held, bytearray()
                self._queued -= len(held)
                self._send(held)

    def _ready(self, mask: int) -> None:
        if self.closed:
            return
        try:
            if mask & selectors.EVENT_WRITE:
                self._flush()
            if mask & selectors.EVENT_READ and not self.closed:
                self._receive()
            self._run_calls()
        except ProtocolError as error:
            self.close(error.problem)
        self._settle()

    def _receive(self) -> None:
        try:
            data = self._socket.recv(_READ_SIZE)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self.close(f"lost: {error.strerror}")
            return
        if not data:
            self.close("has gone")
            return
        self._decoder.feed(data)
        if self._waits and len(self._decoder) > 2 * self._owner.limits.message:
            raise ProtocolError(self._decoder.place, "made too many calls without waiting for an answer")

    def _run_calls(self) -> None:
        for _ in range(self._owner.limits.calls_per_turn):
            # A client that does not read its answers gets no new ones.
            if self.closed or self._output or (self._waits and self._calls):
                return
            message = self._decoder.peek()
            if message is None:
                return
            call = Call(self, message)
            self._waits = bool(self._calls) and not self._owner.runs_beside_stream(call.method)
            if self._waits:
                return
            self._decoder.skip()
            if not call.oneway:
                self._calls.append(call)
            self._owner.dispatch(call)

    def _send(self, message: bytes | bytearray | memoryview) -> None:
        if self.closed:
            return
        sent = 0
        if not self._output:
            try:
                sent = self._socket.send(message)
            except (BlockingIOError, InterruptedError):
                pass
            except OSError as error:
                self.close(f"lost: {error.strerror}")
                return
        elif self._queued + len(message) > self._owner.limits.queue:
            self.close("does not read what it asked for")
            return
        if sent < len(message):
            if not self._output:
                self._sent = sent
            # The whole of it counts until its end is sent: so long it takes memory.
            self._output.append(memoryview(message))
            self._queued += len(message)

    def _flush(self) -> None:
        while self._output:
            message = self._output[0]
            try:
                self._sent += self._socket.send(message[self._sent :])
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                self.close(f"lost: {error.strerror}")
                return
            if self._sent == len(message):
                self._output.popleft()
                self._queued -= len(message)
                self._sent = 0

    def _settle(self) -> None:
        """After anything happened: account for the buffers, and ask the selector for what is next."""
        if self.closed:
            return
        used = self._queued + len(self._decoder)
        if used != self.charged:
            amount, self.charged = used - self.charged, used
            if not self._owner.charge(self, amount):
                return
        runnable = not self._calls if self._waits else self._decoder.has_message
        # Calls that are already read run at the next turn of the loop, after everybody else's: a writable socket
        # reports at once. A client with output waiting is not read from; so the end of its input is only ever seen
        # when all of its calls have run and their answers are on their way.
        interest = selectors.EVENT_WRITE if self._output or runnable else selectors.EVENT_READ
        if interest != self._interest:
            self._interest = interest
            self._owner.selector.modify(self._socket, interest, self._ready)
