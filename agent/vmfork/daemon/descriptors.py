# SPDX-License-Identifier: Apache-2.0
"""How many descriptors vmforkd may have open: as many as its administrator allows, for each subscriber takes one.

The soft limit is 1024 by convention only, because select() can do no more. vmforkd uses epoll and raises it; what it
starts gets the limit back with which vmforkd was started itself: a hook may well use select().
"""

from __future__ import annotations

import logging
import resource
from collections.abc import Iterator
from contextlib import contextmanager

log = logging.getLogger(__name__)

_at_start = resource.getrlimit(resource.RLIMIT_NOFILE)


def raise_limit() -> None:
    """Raise the soft limit to the hard one; where that is refused, fewer subscribers fit, and the log says so."""
    _set(_at_start[1])


@contextmanager
def limit_for_children() -> Iterator[None]:
    """A process started inside has the limit that vmforkd was started with; descriptors that are open stay open."""
    soft_now, _hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    _set(_at_start[0])
    try:
        yield
    finally:
        _set(soft_now)


def _set(soft: int) -> None:
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, _at_start[1]))
    except (OSError, ValueError) as error:
        log.warning("the limit of open descriptors stays as it is: %s", error)
