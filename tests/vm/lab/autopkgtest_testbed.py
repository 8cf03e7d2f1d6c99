#!/usr/bin/python3
# SPDX-License-Identifier: Apache-2.0
"""A guest of the lab as autopkgtest's testbed; `lab.autopkgtest` serves the socket that is the first argument.

With nothing more it is the server that autopkgtest starts, built like those it comes with. With a command behind the
socket it runs that in the guest, with this process' input and output.
"""

from __future__ import annotations

import base64
import importlib
import json
import os
import socket
import sys
from typing import Any

sys.path.insert(0, "/usr/share/autopkgtest/lib")


def run(path: str, argv: list[str]) -> int:
    """Run a command in the guest; its exit status."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        request = {"argv": argv, "stdin": base64.b64encode(sys.stdin.buffer.read()).decode()}
        connection.sendall(json.dumps(request).encode() + b"\n")
        with connection.makefile("rb") as file:
            answer = json.loads(file.readline())
    output = base64.b64decode(answer["stdout"])
    # autopkgtest gives a read-only output to commands that have nothing to say.
    if output:
        sys.stdout.buffer.write(output)
    sys.stderr.write(answer["stderr"])
    return int(answer["exit_code"])


# The names below are what autopkgtest's VirtSubproc looks for in the main module.


def hook_open() -> None:
    """The guest runs already."""
    virt.auxverb = [sys.executable, os.path.abspath(__file__), sys.argv[1]]


def hook_downtmp(path: str | None) -> Any:
    """A directory in the guest."""
    return virt.downtmp_mktemp(path)


def hook_cleanup() -> None:
    """Whoever started the guest ends it."""
    virt.downtmp_remove()


def hook_capabilities() -> list[str]:
    """A machine of its own, and root in it."""
    return ["isolation-machine", "root-on-testbed"]


if len(sys.argv) > 2:
    sys.exit(run(sys.argv[1], sys.argv[2:]))
virt: Any = importlib.import_module("VirtSubproc")
virt.main()
