# SPDX-License-Identifier: Apache-2.0
"""Runs in the guest: takes commands from the host over a virtio-serial port and answers each with one frame.

A frame is a JSON object on a line. Request: `id`, `argv`, `timeout` in seconds, optionally `stdin` (base64). Answer:
`id`, `exit_code` (null after a timeout), `stdout`, `stderr` (base64). Every request runs in a thread of its own, so a
long one blocks nobody. After a restore another QEMU is at the other end: the host starts with an empty line, which ends
a frame that was cut in half; what is no valid request is dropped. Standard library only, Python 3.11.
"""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sys
import threading
import time
from typing import Any

PORT_NAME = "vmfork.lab"
_PORTS = "/sys/class/virtio-ports"


def find_port(name: str) -> str:
    """The device node of the named port, as soon as the kernel has found it."""
    while True:
        try:
            for port in os.listdir(_PORTS):
                with open(f"{_PORTS}/{port}/name", encoding="ascii") as file:
                    if file.read().strip() == name and os.path.exists(f"/dev/{port}"):
                        return f"/dev/{port}"
        except OSError:
            pass
        time.sleep(0.02)


def run(argv: list[str], stdin: bytes, timeout: float) -> dict[str, Any]:
    """Run a command in its own session; at the timeout the whole session is killed."""
    try:
        process = subprocess.Popen(
            argv,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            cwd="/",
        )
    except OSError as error:
        return {"exit_code": 127, "stdout": "", "stderr": encode(f"{argv[0]}: {error.strerror}\n".encode())}
    exit_code: int | None
    try:
        out, err = process.communicate(stdin, timeout)
        exit_code = process.returncode
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        exit_code = None
    return {"exit_code": exit_code, "stdout": encode(out), "stderr": encode(err)}


def encode(data: bytes) -> str:
    """Bytes as they travel in a frame."""
    return base64.b64encode(data).decode()


class Server:
    """Answers the requests that arrive on one descriptor."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._write = threading.Lock()

    def serve(self) -> None:
        """Read requests until the descriptor fails. A port nobody is connected to reads as empty: ask again later."""
        unread = b""
        while True:
            data = os.read(self._descriptor, 65536)
            if not data:
                unread = b""
                time.sleep(0.02)
                continue
            *lines, unread = (unread + data).split(b"\n")
            for line in lines:
                self._begin(line)

    def _begin(self, line: bytes) -> None:
        try:
            request = json.loads(line)
            arguments = (
                [str(word) for word in request["argv"]],
                base64.b64decode(request.get("stdin", "")),
                float(request["timeout"]),
            )
            identifier = str(request["id"])
        except (ValueError, TypeError, KeyError):
            return
        threading.Thread(target=lambda: self._answer(identifier, run(*arguments)), daemon=True).start()

    def _answer(self, identifier: str, answer: dict[str, Any]) -> None:
        frame = json.dumps({"id": identifier, **answer}).encode() + b"\n"
        with self._write:
            while frame:
                frame = frame[os.write(self._descriptor, frame) :]


def main() -> None:
    """Serve the port that the first argument names, a device node or the name of a port."""
    name = sys.argv[1] if len(sys.argv) > 1 else PORT_NAME
    node = name if name.startswith("/") else find_port(name)
    Server(os.open(node, os.O_RDWR)).serve()


if __name__ == "__main__":
    main()
