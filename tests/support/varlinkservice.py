# SPDX-License-Identifier: Apache-2.0
"""A small service behind the real varlink server, on a real selectors loop.

In a test, `Loop.until` turns the loop in the test's own thread, or `Loop.running` in another one for blocking clients.
As a program (`python -m support.varlinkservice SOCKET`) it is a server process; it prints "ready" when it listens.
"""

from __future__ import annotations

import os
import selectors
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from support.crowd import connected, connected_as
from vmfork.jsonfields import JsonObject
from vmfork.varlink import framing
from vmfork.varlink.call import Call
from vmfork.varlink.server import Product, Server
from vmfork.varlink.shares import Limits

DEADLINE = 20.0

STATUS: JsonObject = {
    "generation": 7,
    "state": "settled",
    "detection": "event",
    "generation_id": None,
    "generation_tag": None,
    "sources": [{"name": "kmsg", "role": "edge", "live": True, "detail": "reads the log", "hint": None}],
    "last_fork": None,
    "identity": {"policy": "keep", "reason": "no evidence"},
    "version": "0",
    "stragglers": [],
    "problems": [],
}


def event(generation: int) -> JsonObject:
    """A fork as the interface describes it, with the hooks of a usual reaction."""
    hook: JsonObject = {
        "name": "10-rng",
        "path": "/usr/lib/vmfork/hooks.d/10-rng",
        "result": "ok",
        "exit_code": 0,
        "signal": None,
        "duration_ms": 12,
    }
    return {
        "generation": generation,
        "token": "00112233445566778899aabbccddeeff",
        "kind": "live",
        "edges": ["kmsg", "timer"],
        "generation_id": None,
        "previous_generation_id": None,
        "detected_at": "2026-11-05T10:00:00.000000Z",
        "boottime_ns": 12345678901234,
        "detect_latency_us": 250,
        "clock_step_ns": None,
        "identity": {"policy": "keep", "reason": "no evidence"},
        "state": "settled",
        "hooks": [hook] * 12,
    }


class Service:
    """Methods that show every way to answer: at once, later, many times, with an error, not at all."""

    def __init__(self) -> None:
        self.generation = 7
        self.subscribers: list[Call] = []
        self.acknowledged: list[int] = []
        self.prepared: list[Call] = []

    def methods(self) -> dict[str, Callable[[Call], None]]:
        return {
            "io.vmfork.GetStatus": lambda call: call.reply({"status": STATUS}),
            "io.vmfork.Subscribe": self.subscribe,
            "io.vmfork.Acknowledge": self.acknowledge,
            "io.vmfork.ListForks": self.list_forks,
            "io.vmfork.Trigger": self.trigger,
            "io.vmfork.Prepare": self.prepared.append,
            "io.vmfork.Resume": self.resume,
        }

    def subscribe(self, call: Call) -> None:
        self.subscribers.append(call)
        call.connection.on_close = lambda: self.subscribers.remove(call)
        call.reply(self._notice("hello"), continues=True)

    def acknowledge(self, call: Call) -> None:
        self.acknowledged.append(call.parameters.integer("generation", minimum=1))
        call.reply()

    def list_forks(self, call: Call) -> None:
        limit = call.parameters.integer_or_none("limit") or 0
        call.reply({"forks": [event(number) for number in range(limit)]})

    def trigger(self, call: Call) -> None:
        self.generation += 1
        self.tell("fork")
        call.reply({"event": event(self.generation)})

    def resume(self, call: Call) -> None:
        waiting, self.prepared[:] = self.prepared[:], []
        for prepare in waiting:
            prepare.reply({"snapshot": 1, "not_ready": []})
        call.reply()

    def tell(self, notice: str) -> None:
        message = framing.encode_reply(self._notice(notice), continues=True)
        for call in self.subscribers[:]:
            call.connection.send_encoded(message)

    def _notice(self, notice: str) -> JsonObject:
        shown = event(self.generation) if notice == "fork" else None
        return {"notice": notice, "generation": self.generation, "snapshot": None, "event": shown}


class Loop:
    """A server with `Service` at `path`, and the loop that drives it."""

    def __init__(
        self,
        path: str,
        *,
        limits: Limits | None = None,
        mode: int = 0o666,
        selector: selectors.BaseSelector | None = None,
    ) -> None:
        self.path = path
        self.service = Service()
        self.turns = 0
        self._selector = selector or selectors.DefaultSelector()
        self.server = Server(
            self._selector,
            path,
            mode=mode,
            methods=self.service.methods(),
            product=Product(version="1.2.3", url="https://example.org/"),
            limits=limits,
            needs_more={"io.vmfork.Subscribe"},
            beside_stream={"io.vmfork.Acknowledge"},
            unserved="io.vmfork.PermissionDenied",
        )

    def turn(self, timeout: float = 0.02) -> int:
        """One pass over what is ready; how many descriptors were."""
        ready = self._selector.select(timeout)
        for key, mask in ready:
            key.data(mask)
        self.turns += 1
        return len(ready)

    def until(self, condition: Callable[[], object], what: str) -> None:
        deadline = time.monotonic() + DEADLINE
        while not condition():
            assert time.monotonic() < deadline, f"waited in vain: {what}"
            self.turn()

    @contextmanager
    def running(self) -> Iterator[Loop]:
        """The loop turns in a thread of its own inside the block."""
        over = threading.Event()

        def work() -> None:
            while not over.is_set():
                self.turn()

        thread = threading.Thread(target=work)
        thread.start()
        try:
            yield self
        finally:
            over.set()
            thread.join()

    def close(self) -> None:
        self.server.close()
        self._selector.close()


class RawClient:
    """A client that says exactly what it is told to, broken or not. Never blocks. With a `uid` it is that user's."""

    def __init__(self, loop: Loop, *, uid: int | None = None) -> None:
        self._loop = loop
        self.socket = connected(loop.path) if uid is None else connected_as(uid, loop.path)
        self.socket.settimeout(0)
        self.decoder = framing.Decoder(limit=framing.REPLY_LIMIT, place="server")
        self.hung_up = False

    def send(self, data: bytes) -> None:
        """Everything, with turns of the loop in between; stops where the server hangs up."""
        rest = memoryview(data)
        while rest and not self.hung_up:
            try:
                rest = rest[self.socket.send(rest) :]
            except BlockingIOError:
                self._loop.turn()
            except (BrokenPipeError, ConnectionResetError):
                self.hung_up = True

    def call(
        self, method: str, parameters: JsonObject | None = None, *, more: bool = False, oneway: bool = False
    ) -> None:
        self.send(framing.encode_call(method, parameters, more=more, oneway=oneway))

    def read(self) -> JsonObject | None:
        """The next message that has arrived; notes in `hung_up` when the server closed."""
        while not self.hung_up:
            try:
                data = self.socket.recv(65536)
            except BlockingIOError:
                break
            except ConnectionResetError:
                data = b""
            self.hung_up = not data
            self.decoder.feed(data)
        return self.decoder.take()

    def answer(self) -> JsonObject:
        """The next message, with turns of the loop until it is there."""
        found: list[JsonObject] = []

        def arrived() -> bool:
            message = self.read()
            if message is not None:
                found.append(message)
            return bool(found)

        self._loop.until(arrived, "an answer")
        return found[0]

    def is_dropped(self) -> bool:
        self.read()
        return self.hung_up

    def close(self) -> None:
        self.socket.close()


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    loop = Loop(sys.argv[1])
    try:
        print("ready", flush=True)
        while True:
            loop.turn(timeout=10)
    finally:
        loop.close()


if __name__ == "__main__":
    os.environ.setdefault("LANG", "C.UTF-8")
    main()
