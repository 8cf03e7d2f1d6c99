# SPDX-License-Identifier: Apache-2.0
"""A detector that is killed right after it published a fork: the note in /run is all that its successor has of it."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

from support.fakeguest import FakeGuest
from support.runningdaemon import RunningDaemon, write_hook
from vmfork.page import GENERATION_OFFSET, read_page


def _kill_when_published(daemon: RunningDaemon, guest: FakeGuest, generation: int) -> None:
    """Spin on the page and kill the moment it changes: hardly an instruction later."""
    with open(guest.paths.generation_page, "rb") as page:
        guest.fork(os.urandom(16))
        wanted = generation.to_bytes(8, "little")
        while os.pread(page.fileno(), 8, GENERATION_OFFSET) != wanted:
            pass
        os.kill(daemon.pid, signal.SIGKILL)
    assert daemon.process is not None
    daemon.process.wait()


def test_a_fork_is_one_event_with_its_own_token_however_soon_after_the_page_the_detector_is_killed(
    guest: FakeGuest,
) -> None:
    write_hook(guest, "10-note", 'echo "$VMFORK_GENERATION $VMFORK_FORK_TOKEN" >> "$VMFORK_ROOT/ran"')
    only_noted = 0
    with RunningDaemon(guest) as daemon:
        for generation in range(2, 12):
            _kill_when_published(daemon, guest, generation)
            memory = json.loads(Path(guest.paths.detector_memory).read_text())
            only_noted += memory["generation"] < generation
            token = read_page(guest.paths.generation_page).token.hex()
            daemon.start()
            event = daemon.settled(generation)
            assert (event["generation"], event["token"], event["edges"]) == (generation, token, ["kmsg"])
            # It was published before this was found out: the next detector has to.
            assert event["identity"] == daemon.status()["identity"]
            assert f"{generation} {token}\n" in (guest.root / "ran").read_text()
        assert [one["generation"] for one in daemon.forks()] == list(range(2, 12))
    # Without this the test would prove nothing: mostly the whole memory was not written yet.
    assert only_noted > 0


def test_a_note_that_cannot_be_understood_is_set_aside_and_reported(guest: FakeGuest) -> None:
    Path(guest.paths.detector_intent).write_text("{")
    with RunningDaemon(guest) as daemon:
        assert "detector.intent" in " ".join(daemon.status()["problems"])
        guest.fork(os.urandom(16))
        daemon.settled(2)
