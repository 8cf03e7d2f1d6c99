# SPDX-License-Identifier: Apache-2.0
"""No core dump of vmforkd, nor of what it starts: generation IDs would be in it.

A limit of 1, not of 0: where core_pattern is a pipe (systemd-coredump, apport) the kernel takes no notice of the limit,
except that it dumps nothing at exactly 1 (fs/coredump.c, coredump_pipe()). To a file, both dump nothing. The units say
the same; this is for a daemon that no unit starts.
"""

from __future__ import annotations

import logging
import resource

log = logging.getLogger(__name__)

_NONE = (1, 1)


def forbid() -> None:
    """From here on; where it is refused, the log says so."""
    if resource.getrlimit(resource.RLIMIT_CORE) == _NONE:
        return
    try:
        resource.setrlimit(resource.RLIMIT_CORE, _NONE)
    except (OSError, ValueError) as error:
        log.warning("a crash may leave generation IDs in a core dump: %s", error)
