# SPDX-License-Identifier: Apache-2.0
"""What looks like a fork and is none starts no reaction."""

from __future__ import annotations

import pytest

from torture.alarms import ALARMS, HIDDEN, Alarm, plain_boot_with_a_new_id, play


@pytest.mark.parametrize("alarm", [*ALARMS, *HIDDEN], ids=str)
def test_is_no_fork(alarm: Alarm) -> None:
    assert play(alarm).violations == []


def test_a_new_id_at_a_plain_boot_runs_the_hooks_and_keeps_the_identity() -> None:
    assert plain_boot_with_a_new_id().violations == []
