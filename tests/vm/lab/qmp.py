# SPDX-License-Identifier: Apache-2.0
"""A QMP client: QEMU's machine protocol, one JSON object a line, over a connected socket.

Commands are sent one at a time; events that arrive meanwhile are dropped, because the lab asks for the state that it
waits for. A refused command raises QmpError with QEMU's own words.
"""

from __future__ import annotations

import json
import socket
from typing import Any

from lab.deadline import Deadline, until
from lab.host import LabError


class QmpError(LabError):
    """QEMU refused a command."""


class Qmp:
    """One monitor connection; `connect` has to be called before the first command."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._unread = b""

    def connect(self, *, seconds: float = 30) -> None:
        """Wait for QEMU's greeting and leave the negotiation mode."""
        deadline = Deadline(seconds, "greeting of QEMU's monitor")
        while "QMP" not in self._message(deadline):
            pass
        self.command("qmp_capabilities")

    def command(self, name: str, *, seconds: float = 60, **arguments: object) -> Any:
        """Run a command and return what it returns. Underscores in argument names stand for hyphens."""
        request: dict[str, object] = {"execute": name}
        if arguments:
            request["arguments"] = {key.replace("_", "-"): value for key, value in arguments.items()}
        self._connection.sendall(json.dumps(request).encode() + b"\n")
        deadline = Deadline(seconds, f"QMP answer to {name}")
        while True:
            message = self._message(deadline)
            if "return" in message:
                return message["return"]
            if "error" in message:
                raise QmpError(f"QMP {name}: {message['error'].get('desc', message['error'])}")

    def status(self) -> str:
        """QEMU's run state: running, paused, inmigrate, postmigrate, ..."""
        return str(self.command("query-status")["status"])

    def wait_status(self, *wanted: str, seconds: float = 60) -> None:
        """Wait until the run state is one of those wanted."""
        until(lambda: self.status() in wanted, seconds=seconds, what=f"QEMU to be {' or '.join(wanted)}", every=0.01)

    def children(self, path: str) -> dict[str, str]:
        """The children of a QOM object: name to type."""
        return {entry["name"]: entry["type"] for entry in self.command("qom-list", path=path)}

    def _message(self, deadline: Deadline) -> dict[str, Any]:
        while b"\n" not in self._unread:
            self._connection.settimeout(deadline.remaining())
            try:
                data = self._connection.recv(65536)
            except TimeoutError:
                continue
            except ConnectionError as error:
                raise LabError(f"QEMU's monitor is gone: {error}") from error
            if not data:
                raise LabError("QEMU's monitor is gone: the process ended")
            self._unread += data
        line, _, self._unread = self._unread.partition(b"\n")
        message = json.loads(line)
        assert isinstance(message, dict)
        return message
