# SPDX-License-Identifier: Apache-2.0
"""The service manager and the journal: the only importer of systemd-python.

Everything here works without systemd too: then nobody is notified, and messages go to stderr. The library is imported
only where systemd asked for it, since it costs the idle detector memory otherwise.
"""

from __future__ import annotations

import logging
import os
import sys

from vmfork.paths import Paths

IDENTIFIER = "vmforkd"


def notify(state: str) -> None:
    """Tell the service manager, for instance "READY=1"; nothing happens outside of a Type=notify service."""
    if not os.environ.get("NOTIFY_SOCKET"):
        return
    from systemd import daemon

    daemon.notify(state)


def booted(paths: Paths) -> bool:
    """True where systemd is the service manager (sd_booted(3)); never below a root prefix."""
    return not paths.is_fake and os.path.isdir("/run/systemd/system")


def set_up_logging(identifier: str, *, verbose: bool = False) -> None:
    """Log to the journal where stderr is one already, else to stderr as plain lines."""
    root = logging.getLogger("vmfork")
    root.setLevel(logging.DEBUG if verbose else logging.INFO)
    root.propagate = False
    root.handlers[:] = [_journal_handler(identifier) or _plain_handler(identifier)]


def _plain_handler(identifier: str) -> logging.Handler:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(f"{identifier}: %(levelname)s: %(message)s"))
    return handler


def _journal_handler(identifier: str) -> logging.Handler | None:
    if not _stderr_is_the_journal():
        return None
    try:
        from systemd import journal
    except ImportError:
        return None
    # Passes on every upper-case attribute of a record (`extra=`) as a field of the entry, MESSAGE_ID too.
    handler: logging.Handler = journal.JournalHandler(SYSLOG_IDENTIFIER=identifier)
    return handler


def _stderr_is_the_journal() -> bool:
    """$JOURNAL_STREAM holds device and inode of the stream that systemd connected (systemd.exec(5))."""
    stream = os.environ.get("JOURNAL_STREAM", "")
    try:
        status = os.fstat(2)
    except OSError:
        return False
    return stream == f"{status.st_dev}:{status.st_ino}"
