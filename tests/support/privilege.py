# SPDX-License-Identifier: Apache-2.0
"""Tests of what somebody without privilege gets to see, also where the test run itself is root's."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

_NOBODY = 65534


@contextmanager
def unprivileged() -> Iterator[None]:
    """Inside, files are opened as nobody; a process that is not root stays who it is."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(_NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)
