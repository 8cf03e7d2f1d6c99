# SPDX-License-Identifier: Apache-2.0
"""SpreadSec=: each clone's share of the window, from when it counts, and the time that hooks get for it."""

from __future__ import annotations

import os
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from support.actions import prepared, write
from vmfork import config
from vmfork.actions import spread
from vmfork.config import HookSettings
from vmfork.model import ForkEvent, Identity, IdentityPolicy, Kind
from vmfork.reactor.session import Rules
from vmfork.settings import SPREAD_SEC, SPREADING_HOOKS

HALF = (2**63).to_bytes(8, "little") + bytes(8)


def left(token: bytes, window: float, *, noticed_sec_ago: float | None = None) -> float:
    """What a clone that noticed its fork so long ago has still to wait; None: a person runs the action."""
    context = prepared("").context
    if noticed_sec_ago is None:
        return spread.left(replace(context, token=token), window)
    noticed = ForkEvent(
        generation=2,
        token=token,
        kind=Kind.LIVE,
        edges=("kmsg",),
        detected_at_ns=1,
        boottime_ns=time.clock_gettime_ns(time.CLOCK_BOOTTIME) - int(noticed_sec_ago * 1e9),
        identity=Identity(policy=IdentityPolicy.ROTATE, reason="test"),
    )
    return spread.left(replace(context, token=token, event=noticed), window)


def test_clones_are_spread_evenly_and_each_keeps_its_place() -> None:
    shares = [spread.share(os.urandom(16), 10) for _ in range(2000)]
    assert all(0 <= share < 10 for share in shares)
    assert min(Counter(int(share) for share in shares).values()) > 120
    token = os.urandom(16)
    assert spread.share(token, 10) == spread.share(token, 10)


def test_nothing_is_delayed_without_a_window() -> None:
    assert spread.share(b"\xff" * 16, 0) == 0


def test_a_share_counts_from_the_fork() -> None:
    assert left(HALF, 60, noticed_sec_ago=10) == pytest.approx(20, abs=1)


def test_a_share_that_is_over_is_not_waited_for_again() -> None:
    assert left(HALF, 60, noticed_sec_ago=31) == 0


def test_a_fork_of_an_earlier_boot_is_waited_for_no_longer_than_the_share() -> None:
    assert left(HALF, 60, noticed_sec_ago=-1000) == 30


def test_by_hand_the_share_counts_from_now() -> None:
    assert left(HALF, 60) == 30


def test_the_latest_clone_waits_nearly_the_whole_window() -> None:
    assert left(b"\xff" * 16, 600, noticed_sec_ago=0) == pytest.approx(600, abs=1)


def test_below_a_root_nobody_waits(tmp_path: Path) -> None:
    write(tmp_path / "etc/vmfork/vmfork.conf", "[React]\nSpreadSec=60\n")
    context = prepared(tmp_path).context
    assert config.load(context.paths).get(SPREAD_SEC) == 60
    assert spread.window(context) == 0


@pytest.mark.parametrize("own", [None, 7.0])
def test_a_hook_that_waits_for_its_turn_gets_the_window_on_top_of_its_time(own: float | None) -> None:
    rules = Rules(
        timeout_sec=30, hook=lambda _: HookSettings(timeout_sec=own), spread_sec=60, spreading=SPREADING_HOOKS
    )
    plain = 30 if own is None else own
    for name in ("30-hostname", "35-mac-address.sh", "40-leases", "55-wireguard"):
        assert rules.limits(name).timeout_sec == plain + 60
    assert rules.limits("25-ssh-host-keys").timeout_sec == plain
    assert rules.limits("40-leases", early=True).timeout_sec == plain
