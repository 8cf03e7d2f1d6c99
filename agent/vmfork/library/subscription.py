# SPDX-License-Identifier: Apache-2.0
"""A subscription to vmforkd's notices that outlives the daemon: one descriptor for as long as it is used.

The descriptor is an epoll that holds the connection of the moment, so selectors never see it change. While the daemon
is away a thread tries to reach it; the new subscription says which fork was seen last, so none is lost in between
(several count as the newest). Nothing blocks but `wait` and the making of a strict subscription.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import threading
import time
from collections import deque
from dataclasses import dataclass

from vmfork.errors import InputError, Unavailable, VmforkError
from vmfork.jsonfields import Fields, JsonObject
from vmfork.model import ForkEvent, Identity, IdentityPolicy, Kind
from vmfork.page import PageContent, read_page
from vmfork.paths import Paths
from vmfork.varlink.client import Client, RemoteError

log = logging.getLogger(__name__)

_HELLO_SEC = 10.0
_FIRST_PAUSE = 0.02
_LONGEST_PAUSE = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Notice:
    """One notice of the daemon; `kind` is what the interface calls `notice`, and "hello" after each connecting."""

    kind: str
    generation: int
    snapshot: int | None = None
    event: ForkEvent | None = None


class Subscription:
    """Notices from the daemon at `paths`. Not for several threads at once; not across os.fork().

    `after` is the generation last seen, None for the present one. With `patient`, a daemon that is not there is waited
    for in the background, and a fork after the making is still told; otherwise Unavailable is raised.
    """

    def __init__(self, paths: Paths, *, track: bool, after: int | None = None, patient: bool = False) -> None:
        self._paths = paths
        self._track = track
        self._made_at_ns = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
        self._last = after
        self._acknowledged = 0
        self._client: Client | None = None
        self._arrived: tuple[Client, JsonObject] | None = None
        self._pending: deque[Notice] = deque()
        self._stop = threading.Event()
        self._handover = threading.Lock()
        self._pid = os.getpid()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._epoll = select.epoll()
        self._epoll.register(self._wake, select.EPOLLIN)
        if patient:
            self._reconnect()
            return
        try:
            self._adopt(*self._connected(track=track))
        except VmforkError as error:
            self.close()
            raise Unavailable(str(error), hint=error.hint) from error
        # A fork may have come in one piece with the hello, or be told by it: the socket shows nothing of it any more.
        self._receive()
        if any(notice.kind != "hello" for notice in self._pending):
            os.eventfd_write(self._wake, 1)

    @property
    def closed(self) -> bool:
        return self._epoll.closed

    def fileno(self) -> int:
        """Readable when `take` has something to do; the same descriptor until `close`."""
        return self._epoll.fileno()

    def take(self) -> Notice | None:
        """The next notice, None if there is none now. Never blocks."""
        if os.getpid() != self._pid:
            raise RuntimeError("this subscription belongs to the parent process; make a new one after os.fork()")
        self._receive()
        notice = self._pending.popleft() if self._pending else None
        # Level-triggered: readable as long as something is left here that the socket does not show any more.
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake)
        if self._pending or self._arrived is not None:
            os.eventfd_write(self._wake, 1)
        return notice

    def wait(self, deadline: float | None = None) -> Notice | None:
        """The next notice; None when `deadline` (time.monotonic()) has passed."""
        while True:
            notice = self.take()
            if notice is not None:
                return notice
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                return None
            self._epoll.poll(left)

    def acknowledge(self, generation: int, snapshot: int | None = None) -> None:
        """Tell the daemon; if it is away, this is repeated when it is back, for a fork."""
        if snapshot is None:
            self._acknowledged = max(self._acknowledged, generation)
        if not self._track or self._client is None:
            return
        try:
            self._client.send("io.vmfork.Acknowledge", {"generation": generation, "snapshot": snapshot}, oneway=True)
        except VmforkError as error:
            self._lost(error)

    def close(self) -> None:
        """Let go of the connection and the descriptor."""
        with self._handover:
            self._stop.set()
            arrived, self._arrived = self._arrived, None
        for client in (self._client, arrived and arrived[0]):
            if client is not None:
                client.close()
        self._client = None
        if not self._epoll.closed:
            self._epoll.close()
            os.close(self._wake)

    def abandon(self) -> None:
        """Close what a child of os.fork() inherited, without the locks that no thread there will ever release."""
        self._handover = threading.Lock()
        self._stop = threading.Event()
        self.close()

    def _receive(self) -> None:
        arrived, self._arrived = self._arrived, None
        try:
            if arrived is not None:
                self._adopt(*arrived)
            while self._client is not None:
                message = self._client.receive()
                if message is None:
                    return
                self._note(message["parameters"])
                if not message["continues"]:
                    raise InputError(self._paths.public_socket, "ended the subscription")
        except VmforkError as error:
            self._lost(error)

    def _note(self, parameters: object) -> None:
        fields = Fields(parameters if isinstance(parameters, dict) else {}, self._paths.public_socket)
        event = fields.object_or_none("event")
        notice = Notice(
            kind=fields.text("notice"),
            generation=fields.integer("generation"),
            snapshot=fields.integer_or_none("snapshot"),
            event=None if event is None else ForkEvent.from_json(event),
        )
        if notice.kind == "hello":
            self._greet(notice)
        elif notice.kind != "fork":
            self._pending.append(notice)
        elif notice.event is not None and (self._last is None or notice.generation > self._last):
            self._last = notice.generation
            self._pending.append(notice)

    def _greet(self, hello: Notice) -> None:
        """What happened while nobody listened, told as a fork."""
        last, event = self._last, hello.event
        if last is None:
            is_missed = event is not None and event.boottime_ns >= self._made_at_ns
        else:
            is_missed = hello.generation > last
        self._last = hello.generation
        if is_missed:
            event = event or self._from_page(hello.generation)
            self._pending.append(Notice(kind="fork", generation=hello.generation, event=event))
        elif self._acknowledged == hello.generation:
            self.acknowledge(hello.generation)
        self._pending.append(hello)

    def _from_page(self, generation: int) -> ForkEvent:
        """A fork that the daemon counted but does not describe."""
        try:
            page = read_page(self._paths.generation_page)
        except VmforkError as error:
            log.debug("fork %d is only known by its number: %s", generation, error)
            page = PageContent(generation=generation)
        return ForkEvent(
            generation=generation,
            token=page.token,
            kind=Kind.LIVE,
            edges=(),
            detected_at_ns=page.detected_at_ns,
            boottime_ns=page.boottime_ns,
            identity=Identity(policy=IdentityPolicy.KEEP, reason="not known to the library"),
        )

    def _connected(self, *, track: bool) -> tuple[Client, JsonObject]:
        client = Client.connect(self._paths.public_socket, timeout=_HELLO_SEC)
        # Without a generation of our own, ask for the last fork in any case: its time says whether it was missed.
        parameters: JsonObject = {"track": track, "after": 0 if self._last is None else self._last}
        try:
            return client, next(client.stream("io.vmfork.Subscribe", parameters, timeout=_HELLO_SEC))
        except VmforkError:
            client.close()
            raise

    def _adopt(self, client: Client, hello: JsonObject) -> None:
        self._client = client
        self._epoll.register(client.fileno(), select.EPOLLIN)
        self._note(hello)

    def _lost(self, error: VmforkError) -> None:
        log.debug("the subscription was lost: %s", error)
        if self._client is not None:
            # Closing takes the socket out of the epoll.
            self._client.close()
            self._client = None
        self._reconnect()

    def _reconnect(self) -> None:
        threading.Thread(target=self._try, name="vmfork-reconnect", daemon=True).start()

    def _try(self) -> None:
        pause, track = _FIRST_PAUSE, self._track
        while not self._stop.wait(pause):
            try:
                arrived = self._connected(track=track)
            except RemoteError as error:
                # Better told and not waited for than not told at all.
                log.warning("vmforkd does not take this program: %s", error)
                track = False
            except VmforkError as error:
                log.debug("vmforkd is away: %s", error)
            else:
                with self._handover:
                    if self._stop.is_set():
                        arrived[0].close()
                    else:
                        self._arrived = arrived
                        os.eventfd_write(self._wake, 1)
                return
            pause = min(2 * pause, _LONGEST_PAUSE)
