# SPDX-License-Identifier: Apache-2.0
"""The service manager and the journal: the only importer of systemd-python.

Everything here works without systemd too: then nobody is notified, and messages go to stderr. The library is imported
with the first message for the journal: loading libsystemd costs 1.5 MiB, and an idle detector has nothing to say.
"""

from __future__ import annotations

import logging
import os
import socket
import sys

from vmfork.paths import Paths

log = logging.getLogger(__name__)

IDENTIFIER = "vmforkd"
# For what a service manager waits for; it takes messages at once, unless it is in trouble itself.
READY_SEC = 1.0


def notify(state: str, *, wait_sec: float = 0.0) -> None:
    """Tell the service manager, for instance "READY=1"; nothing happens outside of a Type=notify service.

    What it does not take within `wait_sec` is logged: nobody may end for it, nor wait for a manager that hangs.
    """
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    try:
        # sd_notify(3): one datagram; "@" stands for the zero byte of an abstract address.
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.settimeout(wait_sec)
            sender.sendto(state.encode(), address.replace("@", "\0", 1) if address[0] == "@" else address)
    except OSError as error:
        log.warning("the service manager cannot be told %s: %s", state.partition("\n")[0], error.strerror or error)


def booted(paths: Paths) -> bool:
    """True where systemd is the service manager (sd_booted(3)); never below a root prefix."""
    return not paths.is_fake and os.path.isdir("/run/systemd/system")


def set_up_logging(identifier: str, *, verbose: bool = False) -> None:
    """Log to the journal where stderr is one already, else to stderr as plain lines."""
    root = logging.getLogger("vmfork")
    root.setLevel(logging.DEBUG if verbose else logging.INFO)
    root.propagate = False
    root.handlers[:] = [_Journal(identifier) if _stderr_is_the_journal() else _plain_handler(identifier)]


def _plain_handler(identifier: str) -> logging.Handler:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(f"{identifier}: %(levelname)s: %(message)s"))
    return handler


class _Journal(logging.Handler):
    """Hands over to systemd-python's handler with the first message; to plain lines where that cannot be had."""

    def __init__(self, identifier: str) -> None:
        super().__init__()
        self._identifier = identifier
        self._real: logging.Handler | None = None

    def emit(self, record: logging.LogRecord) -> None:
        if self._real is None:
            try:
                from systemd import journal
            except (ImportError, OSError):
                self._real = _plain_handler(self._identifier)
            else:
                # Passes on every upper-case attribute of a record (`extra=`) as a field of the entry, MESSAGE_ID too.
                self._real = journal.JournalHandler(SYSLOG_IDENTIFIER=self._identifier)
        self._real.emit(record)


def _stderr_is_the_journal() -> bool:
    """$JOURNAL_STREAM holds device and inode of the stream that systemd connected (systemd.exec(5))."""
    stream = os.environ.get("JOURNAL_STREAM", "")
    try:
        status = os.fstat(2)
    except OSError:
        return False
    return stream == f"{status.st_dev}:{status.st_ino}"
