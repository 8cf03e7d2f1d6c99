# SPDX-License-Identifier: Apache-2.0
"""A fake guest, and a vmforkd that runs in it: what most of these tests begin with."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from support.fakeguest import FakeGuest
from support.runningdaemon import RunningDaemon


@pytest.fixture
def guest(tmp_path: Path) -> Iterator[FakeGuest]:
    """A guest in a plain directory."""
    with FakeGuest(tmp_path / "guest") as made:
        yield made


@pytest.fixture
def daemon(guest: FakeGuest) -> Iterator[RunningDaemon]:
    """vmforkd in that guest; it listens when the test begins, and is stopped at its end."""
    with RunningDaemon(guest) as running:
        yield running
