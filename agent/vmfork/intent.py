# SPDX-License-Identifier: Apache-2.0
"""The fork that is about to be published, noted in RAM with one system call.

detector.json is the memory proper, but composing all of it and renaming the file takes longer than everything else
between an edge and the page. So this note comes first, then the page, and the whole memory when everybody was told. A
detector that was killed in between finds here what detector.json does not have yet.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass

from vmfork import atomicfile
from vmfork.errors import InputError
from vmfork.jsonfields import Fields, parse_object
from vmfork.model import LAST_GENERATION, ForkEvent, Identity, IdentityPolicy, Kind

# The kernel copies a write within one page of a file in RAM as a whole: it looks for a fatal signal before each page
# (generic_perform_write), so a kill leaves the old note or the new one.
_SIZE = 4096

_encode = json.JSONEncoder(separators=(",", ":"), check_circular=False).encode


@dataclass(frozen=True, slots=True, kw_only=True)
class Intent:
    """What a detector must not forget of a fork; the fields are those of `Remembered`."""

    boot_id: str
    event: ForkEvent
    kmsg_sequence: int | None
    truths: Mapping[str, bytes]
    credits: Mapping[str, int]

    @classmethod
    def from_json(cls, fields: Fields) -> Intent:
        truths, credit = fields.object("truths"), fields.object("credits")
        token = fields.hex_or_none("token", size=16)
        return cls(
            boot_id=fields.text("boot_id"),
            event=ForkEvent(
                generation=fields.integer("generation", minimum=1, maximum=LAST_GENERATION),
                token=token if token is not None else bytes(16),
                kind=fields.choice("kind", Kind),
                edges=fields.texts("edges"),
                generation_id=fields.hex_or_none("generation_id", size=16),
                previous_generation_id=fields.hex_or_none("previous_generation_id", size=16),
                detected_at_ns=fields.integer("detected_at_ns"),
                boottime_ns=fields.integer("boottime_ns"),
                identity=Identity(policy=fields.choice("policy", IdentityPolicy), reason=fields.text("reason")),
            ),
            kmsg_sequence=fields.integer_or_none("kmsg_sequence"),
            truths={name: truths.hex_or_none(name) or b"" for name in truths},
            credits={name: credit.integer(name) for name in credit},
        )


class IntentFile:
    """The note of this daemon; OSError where it cannot be had."""

    def __init__(self, path: str) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        # Room for every later note, now: a full /run must not be in the way of a fork.
        try:
            if os.fstat(self._descriptor).st_size < _SIZE:
                os.pwrite(self._descriptor, b"\n" * _SIZE, 0)
        except OSError:
            os.close(self._descriptor)
            raise

    def write(self, intent: Intent) -> bool:
        """Replace the note; False where the intent does not fit in. OSError if the kernel refuses."""
        event = intent.event
        previous = event.previous_generation_id
        note = _encode(
            {
                "boot_id": intent.boot_id,
                "generation": event.generation,
                "token": event.token.hex(),
                "kind": event.kind,
                "edges": event.edges,
                "generation_id": None if event.generation_id is None else event.generation_id.hex(),
                "previous_generation_id": None if previous is None else previous.hex(),
                "detected_at_ns": event.detected_at_ns,
                "boottime_ns": event.boottime_ns,
                "policy": event.identity.policy,
                "reason": event.identity.reason,
                "kmsg_sequence": intent.kmsg_sequence,
                "truths": {name: value.hex() for name, value in intent.truths.items()},
                "credits": intent.credits,
            }
        ).encode()
        return len(note) < _SIZE and os.pwrite(self._descriptor, note.ljust(_SIZE), 0) == _SIZE

    def close(self) -> None:
        os.close(self._descriptor)


def load(path: str) -> Intent | None:
    """The note of the last daemon, None where there is none; InputError if it cannot be understood."""
    try:
        data = atomicfile.read_bounded(path, _SIZE)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise InputError(path, f"cannot be read: {error.strerror}") from error
    return Intent.from_json(parse_object(data, path)) if data.strip() else None
