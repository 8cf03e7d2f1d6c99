# SPDX-License-Identifier: Apache-2.0
"""Runs in the guest: a program like many others, which holds random state from before the snapshot.

`serve` draws something of everything that must differ between clones, in a callback right after each fork, and keeps
it. `ask N` prints, as JSON, what was drawn after a fork that made the generation greater than N; `ask now` draws at
once, fork or not. `shared` is a generator that nobody reseeds: equal in all clones, it proves that they are clones.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import socket
import ssl
import sys
import threading
import uuid

SOCKET = "/run/vmfork-lab.probe"
_DRAWS = 8


class Probe:
    """The state that travels with the snapshot."""

    def __init__(self) -> None:
        self._shared = random.Random(os.urandom(16))
        self._context = ssl.create_default_context()
        self._news = threading.Condition()
        self._generation = 0
        self._drawn: dict[str, object] = {}

    def watch(self) -> None:
        """Reseed this process after each fork, then draw."""
        import vmfork

        random.random()
        vmfork.reseed_on_fork()
        vmfork.register_after_fork(self._on_fork)

    def _on_fork(self) -> None:
        import vmfork

        drawn = self.draw()
        with self._news:
            self._generation = vmfork.generation()
            self._drawn = {**drawn, "generation": self._generation}
            self._news.notify_all()

    def after(self, generation: int) -> dict[str, object]:
        """What was drawn after the fork that made the generation greater than this one; waits for it."""
        with self._news:
            self._news.wait_for(lambda: self._generation > generation, timeout=60)
            return self._drawn

    def draw(self) -> dict[str, object]:
        """One of everything."""
        return {
            "urandom": [os.urandom(16).hex() for _ in range(_DRAWS)],
            "uuid4": str(uuid.uuid4()),
            "random": f"{random.getrandbits(64):016x}",
            "client_random": self._client_random().hex(),
            "shared": f"{self._shared.getrandbits(64):016x}",
        }

    def _client_random(self) -> bytes:
        """The 32 random bytes of a TLS ClientHello, from OpenSSL's generator of this process."""
        hello = ssl.MemoryBIO()
        session = self._context.wrap_bio(ssl.MemoryBIO(), hello, server_hostname="localhost")
        with contextlib.suppress(ssl.SSLWantReadError):
            session.do_handshake()
        # 5 bytes of record header, 4 of handshake header, 2 of version.
        return hello.read()[11:43]


def serve() -> None:
    """Answer one question for each connection, each in its own thread."""
    probe = Probe()
    probe.draw()
    try:
        probe.watch()
    except Exception as error:
        print(f"no callbacks: {error}", file=sys.stderr)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(SOCKET)
    listener.listen()
    while True:
        connection, _ = listener.accept()
        threading.Thread(target=_answer, args=(probe, connection), daemon=True).start()


def _answer(probe: Probe, connection: socket.socket) -> None:
    with connection:
        question = connection.recv(100).decode()
        answer = probe.draw() if question == "now" else probe.after(int(question))
        connection.sendall(json.dumps(answer).encode())


def ask(question: str) -> None:
    """Print the probe's answer."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(SOCKET)
        connection.sendall(question.encode())
        connection.shutdown(socket.SHUT_WR)
        print(b"".join(iter(lambda: connection.recv(65536), b"")).decode())


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve()
    else:
        ask(sys.argv[2])
