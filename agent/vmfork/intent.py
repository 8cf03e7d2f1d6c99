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
from vmfork.jsonfields import Fields, parse_object
from vmfork.model import LAST_GENERATION, UNDECIDED, ForkEvent, Identity, Kind

# The kernel copies a write within one page of a file in RAM as a whole: it looks for a fatal signal before each page
# (generic_perform_write), so a kill leaves the old note or the new one.
_SIZE = 4096

# A line of JSON, put together by hand: setting up an encoder takes longer than all the rest of a note.
_NOTE = (
    '{"boot_id":%s,"generation":%d,"token":"%s","kind":"%s","edges":[%s],"generation_id":%s,'
    '"previous_generation_id":%s,"detected_at_ns":%d,"boottime_ns":%d,"identity":%s,"kmsg_sequence":%s,'
    '"truths":{%s},"credits":{%s}}\n'
)


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
        token, identity = fields.hex_or_none("token", size=16), fields.object_or_none("identity")
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
                identity=UNDECIDED if identity is None else Identity.from_json(identity),
            ),
            kmsg_sequence=fields.integer_or_none("kmsg_sequence"),
            truths={name: truths.hex_or_none(name) or b"" for name in truths},
            credits={name: credit.integer(name) for name in credit},
        )


class IntentFile:
    """The note of this daemon in this boot; OSError where it cannot be had."""

    def __init__(self, path: str, *, boot_id: str) -> None:
        self._boot_id = json.dumps(boot_id)
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        # Room for every later note, now: a full /run must not be in the way of a fork.
        try:
            if os.fstat(self._descriptor).st_size < _SIZE:
                atomicfile.write_all(self._descriptor, b"\n" * _SIZE)
        except OSError:
            os.close(self._descriptor)
            raise

    def write(
        self, event: ForkEvent, *, kmsg_sequence: int | None, truths: Mapping[str, bytes], credited: Mapping[str, int]
    ) -> bool:
        """Replace the note; False where this one does not fit in. OSError if the kernel refuses."""
        identity = event.identity
        text = _NOTE % (
            self._boot_id,
            event.generation,
            event.token.hex(),
            event.kind,
            _joined([f'"{name}"' for name in event.edges]),
            _quoted(event.generation_id),
            _quoted(event.previous_generation_id),
            event.detected_at_ns,
            event.boottime_ns,
            "null" if identity is UNDECIDED else json.dumps(identity.to_json()),
            "null" if kmsg_sequence is None else kmsg_sequence,
            _joined([f'"{name}":"{value.hex()}"' for name, value in truths.items()]),
            _joined([f'"{name}":{value}' for name, value in credited.items()]),
        )
        note = text.encode()
        return len(note) <= _SIZE and os.pwrite(self._descriptor, note, 0) == len(note)

    def close(self) -> None:
        os.close(self._descriptor)


_joined = ",".join


def _quoted(value: bytes | None) -> str:
    return "null" if value is None else f'"{value.hex()}"'


def load(path: str) -> Intent | None:
    """The note of the last daemon, None where there is none; InputError if it cannot be understood.

    UnreadableError, a kind of it, if the kernel refuses: what stands there is not known then.
    """
    data = atomicfile.read_patiently(path, _SIZE)
    # What stands behind the first line is left over from a longer note.
    note = b"" if data is None else data.partition(b"\n")[0].strip()
    return Intent.from_json(parse_object(note, path)) if note else None
