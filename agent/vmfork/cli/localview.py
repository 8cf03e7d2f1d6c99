# SPDX-License-Identifier: Apache-2.0
"""The sources as this process sees them, for `doctor` and `sources` while no daemon runs.

The kernel's log is opened but never read: below a root prefix it is a FIFO, and what is read from it is gone.
"""

from __future__ import annotations

from vmfork import config, settings
from vmfork.daemon.sources import Sources
from vmfork.model import SourceStatus
from vmfork.paths import Paths


def local_sources(paths: Paths) -> tuple[SourceStatus, ...]:
    """What a daemon that started now, with the rights of this process, would say of its sources."""
    loaded = config.load(paths)
    sources = Sources(paths, loaded, kmsg_after=None)
    try:
        timer_runs = sources.needs_timer(sources.read_truths())
        return sources.statuses(timer_runs=timer_runs, interval=loaded.get(settings.POLL_INTERVAL_SEC))
    finally:
        sources.close()
