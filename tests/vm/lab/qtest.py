# SPDX-License-Identifier: Apache-2.0
"""A client of QEMU's qtest protocol: one text command a line, answered by a line that starts with OK or FAIL.

The lab uses a single thing of it: to drive an input of the interrupt controller from outside, as a device would.
"""

from __future__ import annotations

import socket

from lab.deadline import Deadline
from lab.host import LabError


class Qtest:
    """One qtest connection of a running QEMU."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._unread = b""

    def pulse(self, controller: str, line: int) -> None:
        """Raise and lower input `line` of the interrupt controller with this QOM path (an edge)."""
        for level in (1, 0):
            self._command(f"set_irq_in {controller} unnamed-gpio-in {line} {level}")

    def _command(self, text: str) -> None:
        self._connection.sendall(text.encode() + b"\n")
        deadline = Deadline(30, f"qtest answer to {text}")
        while True:
            while b"\n" not in self._unread:
                self._connection.settimeout(deadline.remaining())
                try:
                    data = self._connection.recv(4096)
                except TimeoutError:
                    continue
                if not data:
                    raise LabError(f"QEMU ended at the qtest command {text}")
                self._unread += data
            line, _, self._unread = self._unread.partition(b"\n")
            if line.startswith(b"IRQ"):
                continue
            if not line.startswith(b"OK"):
                raise LabError(f"qtest {text}: {line.decode(errors='replace')}")
            return
