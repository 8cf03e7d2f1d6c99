# SPDX-License-Identifier: Apache-2.0
"""A stand-in for vmforkd: a real generation page and a real varlink service below a root, forked when a test says so.

It runs in a thread of the test, or as a process of its own (`python -m support.forkservice ROOT`, which obeys words on
its standard input). It holds no hooks and no policy; what it tells is what the interface io.vmfork describes.
"""

from __future__ import annotations

import os
import selectors
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from vmfork import page
from vmfork.jsonfields import JsonObject
from vmfork.model import EventState, ForkEvent, Identity, IdentityPolicy, Kind
from vmfork.page import PageWriter
from vmfork.paths import Paths
from vmfork.varlink import framing
from vmfork.varlink.call import Call
from vmfork.varlink.server import Product, Server

DEADLINE = 20.0


def until(condition: Callable[[], object], what: str) -> None:
    """Wait for a condition that another thread or process brings about."""
    give_up_at = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < give_up_at, f"waited in vain: {what}"
        time.sleep(0.002)


class ForkService:
    """A daemon below `root`; a context manager. Its methods may be called from any thread."""

    def __init__(self, root: Path) -> None:
        self.paths = Paths(str(root))
        self.page = PageWriter(self.paths.generation_page)
        self.last: ForkEvent | None = None
        self.acknowledged: list[tuple[int, int | None]] = []
        self.subscribers: list[Call] = []
        self.refuses_tracked = False
        self.forks_at_hello = False
        self._todo: list[Callable[[], None]] = []
        self._stopped = False
        self._awake, self._waker = os.pipe()
        self._thread: threading.Thread | None = None
        self.start()

    def __enter__(self) -> ForkService:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.stop()
        self.page.close()
        os.close(self._awake)
        os.close(self._waker)

    def start(self) -> None:
        """Serve, also again after `stop`."""
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._awake, selectors.EVENT_READ, lambda _mask: os.read(self._awake, 64))
        self._server = Server(
            self._selector,
            self.paths.public_socket,
            mode=0o666,
            methods={
                "io.vmfork.GetStatus": self._get_status,
                "io.vmfork.Subscribe": self._subscribe,
                "io.vmfork.Acknowledge": self._acknowledge,
            },
            product=Product(version="0"),
            needs_more={"io.vmfork.Subscribe"},
            beside_stream={"io.vmfork.Acknowledge"},
        )
        self.page.set_detection(page.DETECTION_EVENT)
        self._stopped = False
        self._thread = threading.Thread(target=self._work)
        self._thread.start()

    def stop(self) -> None:
        """As vmforkd ends: nobody watches, no socket answers, the page stays."""
        if self._thread is None:
            return
        self._stopped = True
        os.write(self._waker, b"x")
        self._thread.join()
        self._thread = None
        self.page.set_detection(page.DETECTION_NONE)
        self._server.close()
        self._selector.close()

    def fork(self, *, tell: bool = True) -> ForkEvent:
        """One more fork: the page first, then the subscribers."""
        event = ForkEvent(
            generation=self.page.current.generation + 1,
            token=os.urandom(16),
            kind=Kind.LIVE,
            edges=("kmsg",),
            detected_at_ns=time.time_ns() // 1000 * 1000,
            boottime_ns=time.clock_gettime_ns(time.CLOCK_BOOTTIME),
            identity=Identity(policy=IdentityPolicy.KEEP, reason="a test"),
        )
        self.page.publish(
            generation=event.generation,
            token=event.token,
            detected_at_ns=event.detected_at_ns,
            boottime_ns=event.boottime_ns,
        )
        self.last = event
        if tell:
            self.tell("fork", event=event)
        return event

    def settle(self, state: EventState = EventState.SETTLED) -> None:
        """The reaction to the last fork ended like this."""
        assert self.last is not None
        self.last = ForkEvent(**{name: getattr(self.last, name) for name in ForkEvent.__slots__} | {"state": state})
        self.page.set_state(page.STATE_SETTLED if state is EventState.SETTLED else page.STATE_FAILED)
        self.tell("settled", event=self.last)

    def tell(self, notice: str, *, event: ForkEvent | None = None, snapshot: int | None = None) -> None:
        """One notice to all subscribers."""
        message = framing.encode_reply(self._notice(notice, event=event, snapshot=snapshot), continues=True)

        def send() -> None:
            for call in self.subscribers[:]:
                call.connection.send_encoded(message)

        self._todo.append(send)
        os.write(self._waker, b"x")

    def await_subscribers(self, count: int) -> None:
        until(lambda: len(self.subscribers) == count, f"{count} subscribers")

    def await_acknowledgement(self, generation: int, snapshot: int | None = None) -> None:
        until(lambda: (generation, snapshot) in self.acknowledged, f"acknowledgement of {generation}, {snapshot}")

    def _work(self) -> None:
        while not self._stopped:
            for key, mask in self._selector.select(1):
                key.data(mask)
            while self._todo:
                self._todo.pop(0)()

    def _notice(self, notice: str, *, event: ForkEvent | None, snapshot: int | None = None) -> JsonObject:
        shown = None if event is None else event.to_json()
        return {"notice": notice, "generation": self.page.current.generation, "snapshot": snapshot, "event": shown}

    def _subscribe(self, call: Call) -> None:
        if self.refuses_tracked and call.parameters.flag("track"):
            call.error("io.vmfork.Busy", {"limit": "tracked subscribers"})
            return
        after = call.parameters.integer_or_none("after")
        missed = self.last if self.last is not None and after is not None and self.last.generation > after else None
        self.subscribers.append(call)
        call.connection.on_close = lambda: self.subscribers.remove(call)
        if self.forks_at_hello:
            self._greet_and_fork(call)
            return
        call.reply(self._notice("hello", event=missed), continues=True)

    def _greet_and_fork(self, call: Call) -> None:
        """Both in one piece, as a busy machine delivers them."""
        hello = framing.encode_reply(self._notice("hello", event=None), continues=True)
        fork = framing.encode_reply(self._notice("fork", event=self.fork(tell=False)), continues=True)
        call.connection.send_encoded(hello + fork)

    def _acknowledge(self, call: Call) -> None:
        snapshot = call.parameters.integer_or_none("snapshot")
        self.acknowledged.append((call.parameters.integer("generation"), snapshot))
        call.reply()

    def _get_status(self, call: Call) -> None:
        state = ("settled", "reacting", "failed")[self.page.current.state]
        call.reply(
            {
                "status": {
                    "generation": self.page.current.generation,
                    "state": state,
                    "detection": "event",
                    "generation_id": None,
                    "generation_tag": None,
                    "sources": [],
                    "last_fork": None if self.last is None else self.last.to_json(),
                    "identity": {"policy": "keep", "reason": "a test"},
                    "version": "0",
                    "stragglers": [],
                    "problems": [],
                }
            }
        )


def main() -> None:
    """Serve below the root in argv[1] until standard input ends; "fork" and "settle" do that, "ok" is answered."""
    with ForkService(Path(sys.argv[1])) as service:
        print("ready", flush=True)
        for line in sys.stdin:
            if line.strip() == "fork":
                service.fork()
            else:
                service.settle()
            print("ok", flush=True)


if __name__ == "__main__":
    main()
