# SPDX-License-Identifier: Apache-2.0
"""The note of a fork that is about to be published: what a killed detector finds, and what it must not believe."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from vmfork import intent
from vmfork.errors import InputError
from vmfork.intent import Intent, IntentFile
from vmfork.model import UNDECIDED, ForkEvent, Identity, IdentityPolicy, Kind

BOOT = 'a "boot"'


def an_intent(
    *,
    generation: int = 2,
    identity: Identity = UNDECIDED,
    generation_id: bytes | None = None,
    previous_generation_id: bytes | None = None,
) -> Intent:
    return Intent(
        boot_id=BOOT,
        event=ForkEvent(
            generation=generation,
            token=bytes(range(16)),
            kind=Kind.LIVE,
            edges=("kmsg", "uevent"),
            detected_at_ns=1_700_000_000_123_456_789,
            boottime_ns=5,
            identity=identity,
            generation_id=generation_id,
            previous_generation_id=previous_generation_id,
        ),
        kmsg_sequence=7,
        truths={"generation_id": b"\x01" * 16, "vmclock": b"\x02" * 8},
        credits={"uevent": 12345},
    )


def chosen(reason: str) -> Identity:
    return Identity(policy=IdentityPolicy.ROTATE, reason=reason)


def write(file: IntentFile, noted: Intent) -> bool:
    return file.write(noted.event, kmsg_sequence=noted.kmsg_sequence, truths=noted.truths, credited=noted.credits)


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "detector.intent")


@pytest.fixture
def file(path: str) -> Iterator[IntentFile]:
    opened = IntentFile(path, boot_id=BOOT)
    yield opened
    opened.close()


def test_what_was_noted_is_read_back(path: str, file: IntentFile) -> None:
    noted = an_intent(generation_id=b"\x01" * 16, previous_generation_id=b"\x03" * 16)
    assert write(file, noted)
    assert intent.load(path) == noted


def test_absent_ids_stay_absent(path: str, file: IntentFile) -> None:
    assert write(file, an_intent())
    assert intent.load(path) == an_intent()


def test_a_note_of_nothing_but_a_fork_is_read_back(path: str, file: IntentFile) -> None:
    bare = replace(an_intent(), kmsg_sequence=None, truths={}, credits={})
    assert write(file, replace(bare, event=replace(bare.event, edges=())))
    assert intent.load(path) == replace(bare, event=replace(bare.event, edges=()))


def test_an_identity_that_was_asked_for_is_kept(path: str, file: IntentFile) -> None:
    noted = an_intent(identity=chosen('root said "rotate"\n'))
    assert write(file, noted)
    assert intent.load(path) == noted


def test_a_shorter_note_leaves_nothing_of_the_longer_one(path: str, file: IntentFile) -> None:
    write(file, an_intent(identity=chosen("a long reason " * 20)))
    write(file, an_intent(generation=3))
    assert intent.load(path) == an_intent(generation=3)


def test_a_new_file_holds_no_note(path: str) -> None:
    assert intent.load(path) is None
    IntentFile(path, boot_id=BOOT).close()
    assert intent.load(path) is None


def test_a_note_survives_the_next_daemon_s_start(path: str, file: IntentFile) -> None:
    write(file, an_intent())
    IntentFile(path, boot_id="another").close()
    assert intent.load(path) == an_intent()


def test_a_note_that_does_not_fit_is_refused_and_the_old_one_stays(path: str, file: IntentFile) -> None:
    write(file, an_intent())
    assert not write(file, an_intent(generation=3, identity=chosen("x" * 5000)))
    assert intent.load(path) == an_intent()


def test_room_for_a_note_is_there_before_the_first_fork(path: str) -> None:
    IntentFile(path, boot_id=BOOT).close()
    assert Path(path).stat().st_blocks * 512 >= 4096


@pytest.mark.parametrize("text", ["{", "[]", '{"boot_id":"a"}', "\x00" * 100])
def test_what_cannot_be_understood_is_an_input_error(path: str, text: str) -> None:
    Path(path).write_text(text)
    with pytest.raises(InputError, match=r"detector\.intent"):
        intent.load(path)


def test_a_note_without_end_is_an_input_error(path: str) -> None:
    Path(path).write_bytes(b" " * 10_000)
    with pytest.raises(InputError):
        intent.load(path)


def test_a_note_without_room_leaves_no_descriptor_open() -> None:
    # The books try again with growing pauses for as long as there is no room.
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError, match="No space left"):
        IntentFile("/dev/full", boot_id=BOOT)
    assert len(os.listdir("/proc/self/fd")) == before
