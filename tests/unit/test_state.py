# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from support.fakeguest import FakeGuest
from vmfork import atomicfile, history, state
from vmfork.errors import InputError
from vmfork.history import HistoryWriter
from vmfork.jsonfields import parse_object
from vmfork.model import EventState, ForkEvent, HookOutcome, HookResult, Identity, IdentityPolicy, Kind
from vmfork.paths import Paths
from vmfork.state import Preparation, Remembered, Saved


def event(generation: int = 2, *, state: EventState = EventState.SETTLED) -> ForkEvent:
    return ForkEvent(
        generation=generation,
        token=generation.to_bytes(16, "big"),
        kind=Kind.LIVE,
        edges=("kmsg", "vmclock"),
        generation_id=bytes(range(16)),
        previous_generation_id=None,
        detected_at_ns=1_790_000_000_123_456_000,
        boottime_ns=77,
        detect_latency_us=210,
        clock_step_ns=-5,
        identity=Identity(policy=IdentityPolicy.KEEP, reason="a test"),
        state=state,
        hooks=(HookResult(name="10-rng", path="/x", result=HookOutcome.OK, exit_code=0, duration_ms=3),),
    )


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    with FakeGuest(tmp_path) as guest:
        return guest.paths


def test_an_event_survives_its_json_form() -> None:
    text = json.dumps(event().to_json(with_ids=True))
    assert ForkEvent.from_json(parse_object(text, "test")) == event()


def test_an_event_shows_no_generation_id_unless_asked_by_name() -> None:
    assert event().to_json()["generation_id"] is None


def test_the_time_of_an_event_is_written_as_the_contract_says() -> None:
    assert event().to_json()["detected_at"] == "2026-09-21T14:13:20.123456Z"


def test_what_is_remembered_survives_its_file(paths: Paths) -> None:
    remembered = Remembered(
        boot_id="b",
        generation=9,
        kmsg_sequence=44,
        truths={"generation_id": bytes(16), "vmclock": b"\1" * 8},
        credits={"kmsg": 5},
        interrupts={"gpe05": 3},
        tag_key=b"k" * 16,
        event=event(9, state=EventState.REACTING),
        handled=False,
        unwritten=(event(8, state=EventState.SUPERSEDED),),
        mark_used_up=True,
        preparation=Preparation(undo_at_ns=7, undoing=True),
        snapshot=3,
    )
    state.store_remembered(paths, remembered)
    assert state.load_remembered(paths) == remembered
    assert os.stat(paths.detector_memory).st_mode & 0o777 == 0o600


def test_what_is_saved_survives_its_file(paths: Paths) -> None:
    saved = Saved(generation=3, boot_id="b", handled_token=b"t" * 16, generation_id=bytes(16), smbios_uuid="u")
    state.store_saved(paths, saved)
    assert state.load_saved(paths) == saved


def test_no_file_is_no_state(paths: Paths) -> None:
    assert (state.load_saved(paths), state.load_remembered(paths)) == (None, None)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff",
        b'{"generation": 0}',
        b'{"generation": -1}',
        b'{"generation": true}',
        b'{"generation": 1e400}',
        b'{"generation": 1, "generation_id": "00"}',
        b'{"generation": 1, "generation_id": 7}',
        b"[" * 100_000,
    ],
)
def test_a_broken_state_file_is_an_error_that_names_it(paths: Paths, content: bytes) -> None:
    Path(paths.state).write_bytes(content)
    with pytest.raises(InputError, match=r"state\.json"):
        state.load_saved(paths)


def test_a_newer_version_may_add_fields(paths: Paths) -> None:
    Path(paths.state).write_text('{"version": 7, "generation": 4, "news": {"a": [1]}}')
    found = state.load_saved(paths)
    assert found is not None
    assert found.generation == 4


def test_an_enormous_state_file_is_refused(paths: Paths) -> None:
    Path(paths.state).write_bytes(b" " * (5 << 20))
    with pytest.raises(InputError, match="is larger than"):
        state.load_saved(paths)


def test_a_replaced_file_is_never_half_written(tmp_path: Path) -> None:
    target = tmp_path / "file"
    target.write_text("old")
    with pytest.raises(TypeError):
        atomicfile.replace(str(target), "not bytes", durable=True)  # type: ignore[arg-type]
    assert target.read_text() == "old"


def test_a_left_over_of_a_killed_writer_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "file.new").write_text("half")
    atomicfile.replace(str(tmp_path / "file"), b"new", durable=True)
    assert (tmp_path / "file").read_bytes() == b"new"
    assert not (tmp_path / "file.new").exists()


def test_a_planted_link_is_not_written_through(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "file.new").symlink_to(tmp_path / "victim")
    (tmp_path / "file").symlink_to(tmp_path / "victim")
    atomicfile.replace(str(tmp_path / "file"), b"new", durable=False)
    assert (tmp_path / "victim").read_text() == "precious"
    assert not (tmp_path / "file").is_symlink()


def test_the_history_keeps_the_order_and_the_newest_form_of_a_fork(paths: Paths) -> None:
    writer = HistoryWriter(paths)
    writer.append(event(2, state=EventState.SUPERSEDED))
    writer.append(event(3, state=EventState.FAILED))
    writer.append(event(3, state=EventState.SETTLED))
    assert [(one.generation, one.state) for one in history.load(paths).events] == [
        (2, EventState.SUPERSEDED),
        (3, EventState.SETTLED),
    ]


def test_a_torn_line_swallows_no_other(paths: Paths) -> None:
    writer = HistoryWriter(paths)
    writer.append(event(2))
    with open(paths.history, "ab") as file:
        file.write(b'{"generation": 3, "tok')
    writer.append(event(4))
    found = history.load(paths)
    assert ([one.generation for one in found.events], found.unreadable_lines) == ([2, 4], 1)


def test_only_the_newest_thousand_are_kept(paths: Paths) -> None:
    writer = HistoryWriter(paths)
    for generation in range(2, 1302):
        writer.append(event(generation))
    found = history.load(paths).events
    assert (len(found), found[0].generation, found[-1].generation) == (1000, 302, 1301)
    assert Path(paths.history).read_bytes().count(b"\n") < 1200


def test_no_history_is_an_empty_one(paths: Paths) -> None:
    assert history.load(paths).events == ()


def test_a_directory_in_the_place_of_the_history_is_an_error_that_names_it(paths: Paths) -> None:
    Path(paths.history).mkdir()
    with pytest.raises(InputError, match=r"history\.jsonl"):
        history.load(paths)


def test_an_unreadable_boot_id_is_unknown(paths: Paths) -> None:
    Path(paths.boot_id).write_bytes(b"\xff\xff")
    assert state.boot_id(paths) == "unknown"


def test_a_memory_from_before_there_were_preparations_holds(paths: Paths) -> None:
    state.store_remembered(paths, Remembered(boot_id="b", generation=9, tag_key=b"k" * 16, snapshot=4))
    old = json.loads(Path(paths.detector_memory).read_text())
    for name in ("mark_used_up", "preparation", "snapshot"):
        del old[name]
    Path(paths.detector_memory).write_text(json.dumps(old))
    assert state.load_remembered(paths) == Remembered(boot_id="b", generation=9, tag_key=b"k" * 16)
