# SPDX-License-Identifier: Apache-2.0
"""Commands for a guest, and their answers: the host's end of what `guest_channel.py` serves.

A request carries an id that no other request of this host had, so an answer to a question that was asked before a
snapshot, and that each clone now gives, is never taken for the answer to a newer one.
"""

from __future__ import annotations

import base64
import json
import socket
import uuid
from dataclasses import dataclass

from lab.deadline import Deadline
from lab.host import LabError

# On top of a command's own timeout, which the guest keeps: the way there and back, in an emulated machine.
_GRACE = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Completed:
    """How a command in the guest ended; `exit_code` is None when it was killed at its timeout."""

    argv: tuple[str, ...]
    exit_code: int | None
    stdout: str
    stderr: str

    def __str__(self) -> str:
        ending = "timed out" if self.exit_code is None else f"ended with {self.exit_code}"
        return f"{' '.join(self.argv)} {ending}\n{self.stdout}{self.stderr}".strip()


class CommandFailed(LabError):
    """A command in the guest did not end with 0."""


class Channel:
    """The host's end of one guest's channel."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._unread = b""
        self._asked: dict[str, tuple[str, ...]] = {}
        self._answers: dict[str, Completed] = {}

    def send(self, *argv: str, stdin: str = "", timeout: float = 60) -> str:
        """Start a command in the guest; the id that is returned fetches its answer."""
        identifier = uuid.uuid4().hex
        request = {
            "id": identifier,
            "argv": argv,
            "timeout": timeout,
            "stdin": base64.b64encode(stdin.encode()).decode(),
        }
        # The empty line ends whatever an earlier QEMU process left unfinished in the guest's input.
        self._connection.settimeout(_GRACE)
        try:
            self._connection.sendall(b"\n" + json.dumps(request).encode() + b"\n")
        except OSError as error:
            raise LabError(f"the guest's channel is closed ({error}): QEMU ended") from error
        self._asked[identifier] = argv
        return identifier

    def answer(self, identifier: str, *, seconds: float) -> Completed:
        """The answer to a request of `send`. Raises LabError when the guest does not give it in time."""
        deadline = Deadline(seconds, f"the guest's answer to {' '.join(self._asked[identifier])[:200]}")
        while identifier not in self._answers:
            self._receive(deadline)
        del self._asked[identifier]
        return self._answers.pop(identifier)

    def run(self, *argv: str, stdin: str = "", timeout: float = 60) -> Completed:
        """Run a command in the guest and wait for its end."""
        return self.answer(self.send(*argv, stdin=stdin, timeout=timeout), seconds=timeout + _GRACE)

    def check(self, *argv: str, stdin: str = "", timeout: float = 60) -> str:
        """The standard output of a command that must succeed. Raises CommandFailed otherwise."""
        completed = self.run(*argv, stdin=stdin, timeout=timeout)
        if completed.exit_code != 0:
            raise CommandFailed(str(completed))
        return completed.stdout

    def _receive(self, deadline: Deadline) -> None:
        self._connection.settimeout(deadline.remaining())
        try:
            data = self._connection.recv(1 << 20)
        except TimeoutError:
            return
        except ConnectionError:
            data = b""
        if not data:
            raise LabError("the guest's channel is closed: QEMU ended")
        *lines, self._unread = (self._unread + data).split(b"\n")
        for line in lines:
            self._take(line)

    def _take(self, line: bytes) -> None:
        try:
            frame = json.loads(line)
            identifier, exit_code = frame["id"], frame["exit_code"]
            out, err = (base64.b64decode(frame[key]).decode(errors="replace") for key in ("stdout", "stderr"))
        except (ValueError, TypeError, KeyError):
            return
        argv = self._asked.get(identifier)
        if argv is not None:
            self._answers[identifier] = Completed(argv=argv, exit_code=exit_code, stdout=out, stderr=err)
