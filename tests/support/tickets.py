# SPDX-License-Identifier: Apache-2.0
"""A TLS client that keeps the ticket it was given, and says whether a server takes it the next time."""

from __future__ import annotations

import random
import socket
import ssl
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from support.tools import need


def certificate(directory: Path) -> tuple[Path, Path]:
    """A self-signed certificate and its key."""
    openssl = need("openssl", package="openssl")
    kind = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=localhost"
    key, cert = directory / "key.pem", directory / "cert.pem"
    subprocess.run([openssl, *kind.split(), "-keyout", str(key), "-out", str(cert)], check=True, capture_output=True)
    return cert, key


@contextmanager
def open_directory() -> Iterator[Path]:
    """A directory that a server reaches after it has given up root: every run of pytest closes those of pytest."""
    with tempfile.TemporaryDirectory(prefix="vmfork-", ignore_cleanup_errors=True) as name:
        Path(name).chmod(0o755)
        yield Path(name)


def free_port() -> int:
    """A port for a server, below those that the kernel gives to clients, so that none of them takes it meanwhile."""
    while True:
        port = random.randrange(10000, 32000)
        try:
            socket.create_server(("127.0.0.1", port)).close()
        except OSError:
            continue
        return port


class TicketClient:
    """Talks to a port of this machine: after the handshake it says `farewell` and reads to the end."""

    def __init__(self, port: int, farewell: bytes, version: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3) -> None:
        self.port = port
        self._farewell = farewell
        self._version = version
        self._context = self._fresh()

    def _fresh(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        context.minimum_version = context.maximum_version = self._version
        return context

    def connect(self, session: ssl.SSLSession | None = None) -> ssl.SSLSocket:
        """A connection whose handshake is done; the caller closes it."""
        if session is None:
            self._context = self._fresh()
        # A session can only be offered by the context that it was made with.
        return self._context.wrap_socket(socket.create_connection(("127.0.0.1", self.port), 10), session=session)

    def resumed(self, session: ssl.SSLSession | None = None) -> tuple[bool, ssl.SSLSession]:
        """Connect; whether the server took the ticket, and the next one. OSError where nobody answers."""
        with self.connect(session) as wire:
            wire.sendall(self._farewell)
            try:
                while wire.recv(4096):
                    pass
            except ssl.SSLError:
                # Some servers hang up without a close_notify; the ticket came before.
                pass
            assert wire.session is not None
            return bool(wire.session_reused), wire.session

    def answers(self) -> bool:
        try:
            self.resumed()
        except OSError:
            return False
        return True
