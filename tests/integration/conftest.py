# SPDX-License-Identifier: Apache-2.0
"""A fake guest, and a vmforkd that runs in it: what most of these tests begin with."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from support.fakeguest import FakeGuest
from support.runningdaemon import RunningDaemon
from support.tools import need_root
from torture.liveguest import LiveGuest


@pytest.fixture
def guest(tmp_path: Path) -> Iterator[FakeGuest]:
    """A guest in a plain directory."""
    with FakeGuest(tmp_path / "guest") as made:
        yield made


@pytest.fixture
def live() -> Iterator[LiveGuest]:
    """A guest that other users may look into; for root, who can play them."""
    need_root()
    with LiveGuest("guest") as made:
        made.top.chmod(0o755)
        yield made


@pytest.fixture
def daemon(guest: FakeGuest) -> Iterator[RunningDaemon]:
    """vmforkd in that guest; it listens when the test begins, and is stopped at its end."""
    with RunningDaemon(guest) as running:
        yield running
