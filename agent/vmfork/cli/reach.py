# SPDX-License-Identifier: Apache-2.0
"""How vmforkctl reaches vmforkd: by the admin socket where it may, else by the public one."""

from __future__ import annotations

import os

from vmfork.errors import DaemonUnreachable, VmforkError
from vmfork.jsonfields import Fields, JsonObject
from vmfork.paths import Paths
from vmfork.varlink.client import Client

_TIMEOUT_SEC = 10.0


def connect(paths: Paths, *, admin: bool = False, timeout: float | None = _TIMEOUT_SEC) -> Client:
    """A connection to the daemon; with `admin`, to the admin socket or not at all. Raises DaemonUnreachable."""
    if not admin and not os.access(paths.admin_socket, os.W_OK):
        return Client.connect(paths.public_socket, timeout=timeout)
    if admin and os.geteuid() != 0 and not paths.is_fake:
        raise VmforkError("only root may steer vmforkd", hint="run it with sudo")
    return Client.connect(paths.admin_socket, timeout=timeout)


def call(paths: Paths, method: str, parameters: JsonObject | None = None, *, admin: bool = False) -> Fields:
    """One call of io.vmfork, its answer field by field."""
    with connect(paths, admin=admin) as client:
        return Fields(client.call(f"io.vmfork.{method}", parameters or {}), f"answer to {method}")


def daemon_status(paths: Paths) -> JsonObject | None:
    """The daemon's own status, None where it does not run."""
    try:
        with connect(paths) as client:
            answer = client.call("io.vmfork.GetStatus", {})
    except DaemonUnreachable:
        return None
    status = answer.get("status")
    return status if isinstance(status, dict) else None
