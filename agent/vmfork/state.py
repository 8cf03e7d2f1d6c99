# SPDX-License-Identifier: Apache-2.0
"""What the detector remembers: in RAM for a restart of the daemon, on disk for the next boot.

/run/vmforkd/detector.json lives in the guest's memory, so it travels with a snapshot and each clone has its own. It is
written after the page; what is about to be published stands in a note of its own before that (intent.py). On disk,
state.json names the last fork whose reaction ended and the ID it led to: until then a power cut makes the next boot
see the fork again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from vmfork import atomicfile
from vmfork.annotations import Any
from vmfork.errors import InputError, UnreadableError
from vmfork.jsonfields import Fields, JsonObject, parse_object
from vmfork.model import LAST_GENERATION, EventState, ForkEvent, HookResult
from vmfork.paths import Paths

TAG_KEY_BYTES = 16

_VERSION = 1
_MAX_BYTES = 4 << 20
# While the disk refuses, so many forks wait in memory for their line in the history.
_UNWRITTEN = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Preparation:
    """What `vmforkctl prepare` did is still to be undone: at this value of CLOCK_MONOTONIC (ns), if nobody does before.

    `undoing`: that has begun, and the hooks of after-snapshot did not end yet.
    """

    undo_at_ns: int
    undoing: bool = False

    def to_json(self) -> JsonObject:
        return {"undo_at_ns": self.undo_at_ns, "undoing": self.undoing}

    @classmethod
    def from_json(cls, fields: Fields) -> Preparation:
        return cls(undo_at_ns=fields.integer("undo_at_ns"), undoing=fields.flag("undoing"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Remembered:
    """detector.json: where the detector was in this boot.

    `kmsg_sequence` is the last record of the kernel's log that was taken into account; `event` the newest fork;
    `handled` whether its reaction ended; `unwritten` the forks that the history does not have yet; `credits` end at
    these values of CLOCK_MONOTONIC (ns). `mark_used_up`: the mark of a template counts no more, although a file of it
    may still be there. `preparation` is the one that stands, `snapshot` the number of the last one.
    """

    boot_id: str
    generation: int = 1
    kmsg_sequence: int | None = None
    truths: Mapping[str, bytes] = field(default_factory=dict)
    credits: Mapping[str, int] = field(default_factory=dict)
    interrupts: Mapping[str, int] = field(default_factory=dict)
    tag_key: bytes = b""
    event: ForkEvent | None = None
    handled: bool = True
    unwritten: tuple[ForkEvent, ...] = ()
    mark_used_up: bool = False
    preparation: Preparation | None = None
    snapshot: int = 0

    def with_fork(self, event: ForkEvent, interrupted: Sequence[HookResult] = (), **seen: Any) -> Remembered:
        """After a fork, and with what was `seen`; an older one still reacted to is superseded, with these hooks.

        No preparation stands after it: in a clone the hooks of after-fork undo what was prepared in the original.
        """
        unwritten, old = self.unwritten, self.event
        if old is not None and not self.handled:
            old = replace(old, state=EventState.SUPERSEDED)
            for result in interrupted:
                old = old.with_hook(result)
            unwritten = (*unwritten, old)[-_UNWRITTEN:]
        after = replace(self, event=event, generation=event.generation, handled=False, preparation=None)
        return replace(after, unwritten=unwritten, **seen)

    def to_json(self) -> JsonObject:
        return {
            "version": _VERSION,
            "boot_id": self.boot_id,
            "generation": self.generation,
            "kmsg_sequence": self.kmsg_sequence,
            "truths": {name: value.hex() for name, value in self.truths.items()},
            "credits": dict(self.credits),
            "interrupts": dict(self.interrupts),
            "tag_key": self.tag_key.hex(),
            "event": None if self.event is None else self.event.to_json(with_ids=True),
            "handled": self.handled,
            "unwritten": [event.to_json(with_ids=True) for event in self.unwritten],
            "mark_used_up": self.mark_used_up,
            "preparation": None if self.preparation is None else self.preparation.to_json(),
            "snapshot": self.snapshot,
        }

    @classmethod
    def from_json(cls, fields: Fields) -> Remembered:
        truths, credit, interrupts = (fields.object(name) for name in ("truths", "credits", "interrupts"))
        event, preparation = fields.object_or_none("event"), fields.object_or_none("preparation")
        return cls(
            boot_id=fields.text("boot_id"),
            generation=fields.integer("generation", minimum=1, maximum=LAST_GENERATION),
            kmsg_sequence=fields.integer_or_none("kmsg_sequence"),
            truths={name: truths.hex_or_none(name) or b"" for name in truths},
            credits={name: credit.integer(name) for name in credit},
            interrupts={name: interrupts.integer(name) for name in interrupts},
            tag_key=fields.hex_or_none("tag_key", size=TAG_KEY_BYTES) or b"",
            event=None if event is None else ForkEvent.from_json(event),
            handled=fields.flag("handled", default=True),
            unwritten=tuple(ForkEvent.from_json(item) for item in fields.objects("unwritten")),
            mark_used_up=fields.flag("mark_used_up"),
            preparation=None if preparation is None else Preparation.from_json(preparation),
            snapshot=fields.integer_or_none("snapshot") or 0,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Saved:
    """state.json: what the next boot compares with. `handled_token` is the last fork whose reaction ended."""

    generation: int = 1
    boot_id: str | None = None
    handled_token: bytes | None = None
    generation_id: bytes | None = None
    smbios_uuid: str | None = None
    instance_id: str | None = None

    def to_json(self) -> JsonObject:
        return {
            "version": _VERSION,
            "generation": self.generation,
            "boot_id": self.boot_id,
            "handled_token": None if self.handled_token is None else self.handled_token.hex(),
            "generation_id": None if self.generation_id is None else self.generation_id.hex(),
            "smbios_uuid": self.smbios_uuid,
            "instance_id": self.instance_id,
        }

    @classmethod
    def from_json(cls, fields: Fields) -> Saved:
        return cls(
            generation=fields.integer("generation", minimum=1, maximum=LAST_GENERATION),
            boot_id=fields.text_or_none("boot_id"),
            handled_token=fields.hex_or_none("handled_token", size=16),
            generation_id=fields.hex_or_none("generation_id", size=16),
            smbios_uuid=fields.text_or_none("smbios_uuid"),
            instance_id=fields.text_or_none("instance_id"),
        )


def boot_id(paths: Paths) -> str:
    """This boot's ID, which never changes at a fork; "unknown" where the kernel does not show it.

    UnreadableError where it may show it the next time: taken for another boot, this one would lose its forks.
    """
    try:
        text = atomicfile.read_patiently(paths.boot_id, 64) or b""
        return text.decode("ascii").strip() or "unknown"
    except UnreadableError as error:
        if isinstance(error.__cause__, PermissionError):
            return "unknown"
        raise
    except (InputError, UnicodeDecodeError):
        return "unknown"


def load_remembered(paths: Paths) -> Remembered | None:
    """detector.json, None if there is none; InputError if it is broken, its UnreadableError if that is not known."""
    fields = _load(paths.detector_memory)
    return None if fields is None else Remembered.from_json(fields)


def load_saved(paths: Paths) -> Saved | None:
    """state.json, None if there is none; errors as for detector.json."""
    fields = _load(paths.state)
    return None if fields is None else Saved.from_json(fields)


def store_remembered(paths: Paths, remembered: Remembered) -> None:
    """Before the page; in RAM, so without fsync."""
    atomicfile.replace(paths.detector_memory, _dump(remembered.to_json()), durable=False)


def store_saved(paths: Paths, saved: Saved) -> None:
    """Survives a power cut."""
    atomicfile.replace(paths.state, _dump(saved.to_json()), durable=True)


def set_aside(path: str) -> str:
    """Keep a broken file for whoever wants to know what happened; returns its new name."""
    kept = f"{path}.broken"
    os.rename(path, kept)
    return kept


# Made once: json.dumps would make one for each call, between an edge and the page.
_encode = json.JSONEncoder(separators=(",", ":"), check_circular=False).encode


def _dump(obj: JsonObject) -> bytes:
    return _encode(obj).encode() + b"\n"


def _load(path: str) -> Fields | None:
    data = atomicfile.read_patiently(path, _MAX_BYTES)
    return None if data is None else parse_object(data, path)
