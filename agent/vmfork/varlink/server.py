# SPDX-License-Identifier: Apache-2.0
"""A varlink server on one unix socket, driven by somebody else's selector.

Every key it registers carries a callable as `data`; the loop calls `key.data(mask)`. Nothing here blocks, and what
any client, or all of them, can use is bounded by Limits. Who may call what is decided by which methods the socket
serves, never by the peer's uid.
"""

from __future__ import annotations

import errno
import logging
import os
import selectors
import socket
import struct
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from vmfork.errors import InputError, VmforkError
from vmfork.varlink import framing, interface
from vmfork.varlink.call import Call, Caller, InvalidParameter, Peer
from vmfork.varlink.connection import Connection, Selector
from vmfork.varlink.listen import identity, listen
from vmfork.varlink.shares import Limits, Shares

__all__ = ["Call", "Caller", "Handler", "Limits", "Peer", "Product", "Server"]

log = logging.getLogger(__name__)

Handler = Callable[[Call], None]

_UCRED = struct.Struct("=iII")
_EXHAUSTED = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS})


@dataclass(frozen=True, slots=True, kw_only=True)
class Product:
    """What GetInfo answers."""

    vendor: str = "vmfork"
    product: str = "vmforkd"
    version: str
    url: str = ""


class Server:
    """Listens on `path` with permission bits `mode` and runs `methods` (qualified names) for its clients.

    `needs_more`: methods that answer ExpectedMore to a call without `more`. `beside_stream`: methods that act at once
    although a call on the same connection is still in progress; their answers wait for its end, as varlink orders
    answers. `queries`: methods that do nothing but answer, so that a oneway call of one is not run: nobody waits for
    what it would cost. `unserved`: the error for methods of the interface that are not in `methods`, else
    MethodNotImplemented.

    Raises InputError if the socket cannot be made, also when something that is no socket stands at `path`.
    """

    def __init__(
        self,
        selector: Selector,
        path: str,
        *,
        mode: int,
        methods: Mapping[str, Handler],
        product: Product,
        limits: Limits | None = None,
        needs_more: Collection[str] = (),
        beside_stream: Collection[str] = (),
        queries: Collection[str] = (),
        unserved: str | None = None,
    ) -> None:
        self.selector = selector
        self.path = path
        self.limits = limits or Limits()
        self._product = product
        own: dict[str, Handler] = {
            f"{interface.SERVICE}.GetInfo": self._get_info,
            f"{interface.SERVICE}.GetInterfaceDescription": self._get_description,
        }
        self._methods = {**methods, **own}
        self._queries = frozenset({*queries, *own})
        self._needs_more = frozenset(needs_more)
        self._beside_stream = frozenset(beside_stream)
        self._unserved = unserved
        self._shares = Shares(self.limits)
        self._closed = False
        self._accepting = True
        self._reserve = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        try:
            self._listener, self._inode = listen(path, mode)
        except OSError as error:
            os.close(self._reserve)
            raise InputError(path, f"cannot listen on it: {error.strerror}") from error
        selector.register(self._listener, selectors.EVENT_READ, self._accept)

    @property
    def connections(self) -> int:
        """How many clients are connected."""
        return self._shares.connections

    @property
    def buffered(self) -> int:
        """How many bytes are held for all of them."""
        return self._shares.buffered

    def close(self) -> None:
        """Drop all clients and stop listening; the socket file goes if it is still this server's own."""
        if self._closed:
            return
        self._closed = True
        for connection in self._shares.clients():
            connection.close("the server stops")
        if self._accepting:
            self.selector.unregister(self._listener)
        try:
            # While the listener is open, no other file can have got its inode number.
            if identity(self.path) == self._inode:
                os.unlink(self.path)
        except OSError as error:
            log.debug("%s stays: %s", self.path, error.strerror)
        self._listener.close()
        if self._reserve >= 0:
            os.close(self._reserve)

    # What a connection asks of its server.

    def runs_beside_stream(self, method: str) -> bool:
        return method in self._beside_stream

    def charge(self, connection: Connection, amount: int) -> bool:
        return self._shares.charge(connection, amount)

    def forget(self, connection: Connection) -> None:
        self._shares.remove(connection)
        if not self._accepting and not self._closed:
            self._accept_again()

    def dispatch(self, call: Call) -> None:
        """Run one call. What a handler raises as VmforkError becomes the caller's error."""
        try:
            self._run(call)
        except InvalidParameter as error:
            call.error(f"{interface.SERVICE}.InvalidParameter", {"parameter": error.parameter})
        except VmforkError as error:
            log.warning("%s failed: %s", call.method, error)
            if not call.finished:
                call.error(f"{interface.VMFORK}.Failed", {"message": str(error)})

    def _run(self, call: Call) -> None:
        interface_name, _, name = call.method.rpartition(".")
        if interface_name not in (interface.SERVICE, interface.VMFORK):
            call.error(f"{interface.SERVICE}.InterfaceNotFound", {"interface": interface_name})
            return
        declared = interface.load(interface_name)
        method = declared.methods.get(name)
        if method is None:
            call.error(f"{interface.SERVICE}.MethodNotFound", {"method": call.method})
            return
        handler = self._methods.get(call.method)
        if handler is None:
            if self._unserved is None:
                call.error(f"{interface.SERVICE}.MethodNotImplemented", {"method": call.method})
            else:
                call.error(self._unserved)
            return
        misfit = declared.misfit(method.parameters, call.values)
        if misfit is not None:
            raise InvalidParameter(call.method, misfit, "what the interface says")
        if call.method in self._needs_more and not call.more:
            call.error(f"{interface.SERVICE}.ExpectedMore")
            return
        if not (call.oneway and call.method in self._queries):
            handler(call)

    def _get_info(self, call: Call) -> None:
        product = self._product
        call.reply(
            {
                "vendor": product.vendor,
                "product": product.product,
                "version": product.version,
                "url": product.url,
                "interfaces": [interface.VMFORK, interface.SERVICE],
            }
        )

    def _get_description(self, call: Call) -> None:
        name = call.parameters.text("interface")
        if name in (interface.SERVICE, interface.VMFORK):
            call.reply({"description": interface.load(name).text})
        else:
            call.error(f"{interface.SERVICE}.InterfaceNotFound", {"interface": name})

    # Accepting.

    def _accept_again(self) -> None:
        try:
            self.selector.register(self._listener, selectors.EVENT_READ, self._accept)
        except OSError as error:
            if not self.connections:
                raise
            log.warning("%s: no client is accepted until another one ends: %s", self.path, error.strerror)
            return
        self._accepting = True

    def _accept(self, _mask: int) -> None:
        for _ in range(self.limits.accepts_per_turn):
            try:
                sock, _address = self._listener.accept()
            except (BlockingIOError, InterruptedError):
                return
            except ConnectionAbortedError:
                continue
            except OSError as error:
                if error.errno not in _EXHAUSTED:
                    raise
                self._refuse_one(error)
                return
            self._admit(sock)

    def _admit(self, sock: socket.socket) -> None:
        pid, uid, _gid = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
        if not self._shares.admits(uid):
            _refuse(sock)
            return
        try:
            connection = Connection(sock, Peer(uid=uid, pid=pid), self)
        except OSError as error:
            # The kernel has no memory, or no more watches for our user (fs.epoll.max_user_watches).
            log.warning("%s: a client is dropped, it cannot be watched: %s", self.path, error.strerror)
            sock.close()
            return
        self._shares.add(connection)

    def _refuse_one(self, error: OSError) -> None:
        """No descriptor is left for the client at the head of the queue: take it off with the reserve, so that the
        listening socket does not report it for ever; without the reserve, wait until a connection ends."""
        log.debug("refusing a varlink client: %s", error.strerror)
        if self._reserve >= 0:
            os.close(self._reserve)
            self._reserve = -1
            try:
                sock, _address = self._listener.accept()
                _refuse(sock)
            except OSError as again:
                log.debug("not even with the reserve: %s", again.strerror)
        try:
            self._reserve = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            # Somebody else in this system took the last one. With no connection of our own to wait for, keep trying.
            if self.connections:
                self._accepting = False
                self.selector.unregister(self._listener)


def _refuse(sock: socket.socket) -> None:
    with sock:
        sock.settimeout(0)
        try:
            sock.send(framing.encode_error(f"{interface.VMFORK}.Busy", {"limit": "connections"}))
        except OSError as error:
            log.debug("a refused client has gone: %s", error.strerror)
