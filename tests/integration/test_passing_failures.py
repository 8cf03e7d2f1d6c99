# SPDX-License-Identifier: Apache-2.0
"""Sources that cannot be opened for a moment: a link that leads to itself (ELOOP) stands for an error that passes."""

from __future__ import annotations

import os
from pathlib import Path

from support.fakeguest import FakeGuest
from support.runningdaemon import RunningDaemon, eventually
from vmfork import state
from vmfork.detector import GENERATION_ID
from vmfork.page import DETECTION_EVENT, read_page


def put_out_of_reach(path: str) -> Path:
    """Give the file another name, and put a link to itself in its place; what it is called now."""
    kept = Path(f"{path}.kept")
    os.rename(path, kept)
    os.symlink(path, path)
    return kept


def is_live(daemon: RunningDaemon, name: str, role: str) -> bool:
    return any(one["live"] for one in daemon.status()["sources"] if (one["name"], one["role"]) == (name, role))


def test_a_kernel_log_that_could_not_be_opened_at_the_start_is_opened_later(guest: FakeGuest) -> None:
    kept = put_out_of_reach(guest.paths.kmsg)
    with RunningDaemon(guest) as daemon:
        assert not is_live(daemon, "kmsg", "edge")
        kept.replace(guest.paths.kmsg)
        eventually(lambda: is_live(daemon, "kmsg", "edge"))
        assert read_page(guest.paths.generation_page).detection == DETECTION_EVENT
        guest.fork(os.urandom(16))
        assert daemon.settled(2)["edges"] == ["kmsg"]


def test_a_fork_while_the_id_cannot_be_read_counts_once_and_its_id_is_remembered_later(guest: FakeGuest) -> None:
    with RunningDaemon(guest) as daemon:
        put_out_of_reach(guest.paths.fw_cfg_guid)
        guest.reseed_line()
        assert daemon.settled(2)["generation_id"] is None
        new = os.urandom(16)
        guest.set_generation_id(new)

        def is_known() -> bool:
            remembered, saved = state.load_remembered(guest.paths), state.load_saved(guest.paths)
            assert remembered is not None
            assert saved is not None
            return remembered.truths.get(GENERATION_ID) == saved.generation_id == new

        eventually(is_known)
        guest.fork(os.urandom(16))
        daemon.settled(3)
        assert [one["generation"] for one in daemon.forks()] == [2, 3]


def test_the_interrupts_of_a_fork_are_remembered_with_it(guest: FakeGuest) -> None:
    def count(number: int) -> None:
        table = f"           CPU0\n  35:         {number}  GICv2  67 Edge      vmgenid\n"
        guest.put(guest.paths.interrupts, table.encode())

    count(1)
    with RunningDaemon(guest) as daemon:
        count(2)
        guest.fork(os.urandom(16))
        daemon.settled(2)
        remembered = state.load_remembered(guest.paths)
    assert remembered is not None
    assert remembered.interrupts == {"vmgenid": 2}
