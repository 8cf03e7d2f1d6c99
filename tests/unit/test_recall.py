# SPDX-License-Identifier: Apache-2.0
"""What a starting daemon takes of its predecessor's files: what they say, what stands in for it, or nothing."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from support.fakeguest import FIRST_BOOT_ID, FakeGuest
from vmfork import atomicfile, history, intent, state
from vmfork.daemon.ledger import Ledger
from vmfork.daemon.recall import recall
from vmfork.errors import UnreadableError
from vmfork.history import HistoryWriter
from vmfork.model import EventState, ForkEvent, Identity, IdentityPolicy, Kind
from vmfork.paths import Paths
from vmfork.state import Remembered, Saved


def event(generation: int, outcome: EventState = EventState.SETTLED) -> ForkEvent:
    return ForkEvent(
        generation=generation,
        token=generation.to_bytes(16, "big"),
        kind=Kind.LIVE,
        edges=("kmsg",),
        generation_id=bytes([generation] * 16),
        previous_generation_id=None,
        detected_at_ns=1_790_000_000_000_000_000,
        boottime_ns=77,
        identity=Identity(policy=IdentityPolicy.KEEP, reason="a test"),
        state=outcome,
    )


@contextmanager
def no_descriptor_left() -> Iterator[None]:
    """Inside, every open() of this process fails with EMFILE."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    with FakeGuest(tmp_path) as guest:
        return guest.paths


def write_history(paths: Paths, *events: ForkEvent) -> None:
    writer = HistoryWriter(paths)
    for one in events:
        writer.append(one)


def everything_in_place(paths: Paths) -> None:
    state.store_saved(paths, Saved(generation=7, boot_id="older", generation_id=bytes(16)))
    state.store_remembered(paths, Remembered(boot_id=FIRST_BOOT_ID, generation=8, tag_key=bytes(16)))
    note = intent.IntentFile(paths.detector_intent, boot_id=FIRST_BOOT_ID)
    assert note.write(event(9, EventState.REACTING), kmsg_sequence=3, truths={}, credited={})
    note.close()


LOADS: list[Callable[[Paths], object]] = [
    state.load_saved,
    state.load_remembered,
    lambda paths: intent.load(paths.detector_intent),
    state.boot_id,
]


@pytest.mark.parametrize("load", LOADS, ids=["state.json", "detector.json", "detector.intent", "boot_id"])
def test_a_file_that_cannot_be_opened_now_is_not_said_to_be_broken(
    paths: Paths, load: Callable[[Paths], object]
) -> None:
    everything_in_place(paths)
    with no_descriptor_left(), pytest.raises(UnreadableError, match="Too many open files"):
        load(paths)
    assert load(paths) is not None


def test_a_start_that_cannot_read_what_is_left_fails_and_leaves_all_as_it_is(paths: Paths) -> None:
    everything_in_place(paths)
    with no_descriptor_left(), pytest.raises(UnreadableError, match=r"state\.json: cannot be read") as caught:
        Ledger(paths)
    assert "does not start" in str(caught.value.hint)
    assert not list(Path(paths.root).rglob("*.broken"))
    found = recall(paths)
    assert (found.saved.generation, found.remembered.generation) == (7, 9)


def test_what_is_broken_is_reported_by_the_start_that_succeeds(paths: Paths) -> None:
    everything_in_place(paths)
    Path(paths.state).write_text("{")
    Path(paths.detector_memory).unlink()
    # In the place of a file that the kernel refuses: a link to itself.
    Path(paths.detector_memory).symlink_to(paths.detector_memory)
    with pytest.raises(UnreadableError, match=r"detector\.json"):
        recall(paths)
    Path(paths.detector_memory).unlink()
    assert recall(paths).problems.keys() == {f"{paths.state}.broken"}


def test_a_refusal_that_passes_is_waited_for() -> None:
    refusals = [OSError(errno.EIO, "once"), OSError(errno.ENOMEM, "twice")]

    def read() -> str:
        if refusals:
            raise refusals.pop()
        return "read"

    assert atomicfile.patiently(read) == "read"


def test_a_refusal_that_will_not_pass_is_not_waited_for() -> None:
    refusals = [PermissionError(errno.EACCES, "never")]

    def read() -> str:
        raise refusals.pop()

    with pytest.raises(PermissionError):
        atomicfile.patiently(read)


def test_a_read_that_returns_less_than_there_is_is_gone_on_with() -> None:
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(ours)
        # More than a pipe holds at once.
        atomicfile.write_all(theirs, bytes(200_000))
        os._exit(0)
    os.close(theirs)
    try:
        assert len(atomicfile.read_up_to(ours, 1 << 20)) == 200_000
    finally:
        os.close(ours)
        os.waitpid(child, 0)


def test_the_generation_of_a_guest_whose_state_is_broken_does_not_go_back(paths: Paths) -> None:
    write_history(paths, event(6), event(7))
    Path(paths.state).write_text("{")
    ledger = Ledger(paths)
    ledger.close()
    assert ledger.generation == 7
    assert f"{paths.state}.broken" in ledger.problems


def test_the_last_handled_fork_of_the_history_stands_in_for_a_missing_state(paths: Paths) -> None:
    write_history(paths, event(6), event(7), event(8, EventState.SUPERSEDED))
    found = recall(paths)
    assert found.problems == {}
    assert found.saved == Saved(generation=8, handled_token=event(7).token, generation_id=event(7).generation_id)


def test_without_a_state_and_a_history_it_is_the_first_start(paths: Paths) -> None:
    found = recall(paths)
    assert found.saved == Saved()
    assert replace(found.remembered, tag_key=b"") == Remembered(boot_id=FIRST_BOOT_ID)


def test_a_history_that_is_no_file_does_not_keep_the_daemon_from_starting(paths: Paths) -> None:
    os.mkdir(paths.history)
    assert recall(paths).saved == Saved()


def test_a_directory_in_the_place_of_the_state_is_set_aside(paths: Paths) -> None:
    os.mkdir(paths.state)
    assert "is a directory" in recall(paths).problems[f"{paths.state}.broken"]


def test_a_boot_id_that_the_kernel_does_not_show_is_unknown(paths: Paths) -> None:
    os.unlink(paths.boot_id)
    assert state.boot_id(paths) == "unknown"


def test_what_the_disk_refused_to_the_last_daemon_is_written_by_the_next(paths: Paths) -> None:
    state.store_saved(paths, Saved(generation=8, boot_id=FIRST_BOOT_ID, handled_token=event(7).token))
    state.store_remembered(
        paths,
        Remembered(
            boot_id=FIRST_BOOT_ID, generation=9, event=event(9), tag_key=bytes(16), unwritten=(event(8), event(9))
        ),
    )
    ledger = Ledger(paths)
    ledger.baseline(smbios_uuid=None, instance_id=None)
    ledger.close()
    assert history.load(paths).events == (event(8), event(9))
    saved, remembered = state.load_saved(paths), state.load_remembered(paths)
    assert saved is not None
    assert remembered is not None
    assert (saved.generation, saved.handled_token, remembered.unwritten) == (9, event(9).token, ())


def test_a_fork_whose_reaction_has_not_ended_is_not_taken_for_handled(paths: Paths) -> None:
    state.store_saved(paths, Saved(generation=8, boot_id=FIRST_BOOT_ID, handled_token=event(8).token))
    unfinished = Remembered(
        boot_id=FIRST_BOOT_ID, generation=9, event=event(9, EventState.REACTING), tag_key=bytes(16), handled=False
    )
    state.store_remembered(paths, unfinished)
    ledger = Ledger(paths)
    ledger.baseline(smbios_uuid=None, instance_id=None)
    ledger.close()
    saved = state.load_saved(paths)
    assert saved is not None
    assert saved.handled_token == event(8).token
