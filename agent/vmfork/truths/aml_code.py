# SPDX-License-Identifier: Apache-2.0
"""The encoding of AML (ACPI 6.5, section 20.2): numbers, package lengths, names, and how long each term is.

`Code` is one table and reads at offsets into it; `skip` finds the end of any term without understanding it, in time
linear in its length and without recursion. What cannot be read raises NotUnderstood with table and offset. Nothing
here gives a term a meaning: that is for the namespace and the evaluator.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from vmfork.errors import AbsentError

Path = tuple[str, ...]

ALIAS, NAME, SCOPE, BUFFER, PACKAGE, VAR_PACKAGE, METHOD, EXTERNAL = 0x06, 0x08, 0x10, 0x11, 0x12, 0x13, 0x14, 0x15
ZERO, ONE, BYTE, WORD, DWORD, STRING, QWORD, ONES = 0x00, 0x01, 0x0A, 0x0B, 0x0C, 0x0D, 0x0E, 0xFF
LOCAL0, LOCAL7, STORE, ADD, SUBTRACT, AND, OR = 0x60, 0x67, 0x70, 0x72, 0x74, 0x7B, 0x7D
SHIFT_LEFT, SHIFT_RIGHT, DEREF_OF, INDEX = 0x79, 0x7A, 0x83, 0x88
LOGICAL_AND, LOGICAL_OR, LOGICAL_NOT, EQUAL, GREATER, LESS = 0x90, 0x91, 0x92, 0x93, 0x94, 0x95
IF, ELSE, WHILE, NO_OPERATION, RETURN = 0xA0, 0xA1, 0xA2, 0xA3, 0xA4
MUTEX, EVENT, REGION, FIELD, DEVICE, PROCESSOR, POWER, THERMAL_ZONE, INDEX_FIELD, BANK_FIELD, DATA_REGION = (
    0x5B01, 0x5B02, 0x5B80, 0x5B81, 0x5B82, 0x5B83, 0x5B84, 0x5B85, 0x5B86, 0x5B87, 0x5B88,
)  # fmt: skip
NUMBER_SIZES = {BYTE: 1, WORD: 2, DWORD: 4, QWORD: 8}

_EXTENDED = 0x5B
_ROOT, _PARENT, _DUAL_NAME, _MULTI_NAME, _NULL_NAME = 0x5C, 0x5E, 0x2E, 0x2F, 0x00
_SEGMENT_FIRST = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZ_")
_SEGMENT_REST = _SEGMENT_FIRST | frozenset(b"0123456789")
_NAME_FIRST = _SEGMENT_FIRST | {_ROOT, _PARENT, _DUAL_NAME, _MULTI_NAME}

# What follows each opcode. t: a term; s: a term or name that is only named, not called (a NullName looks like Zero);
# n: the name of a new object; 1, 2, 4, 8: so many bytes; z: bytes up to a NUL; p: a length that covers all the rest.
_OPCODES: dict[str, tuple[int, ...]] = {
    "": (ZERO, ONE, ONES, *range(LOCAL0, 0x6F), 0x9F, NO_OPERATION, 0xA5, 0xCC, 0x5B30, 0x5B31, 0x5B33),
    "1": (BYTE,),
    "2": (WORD,),
    "4": (DWORD,),
    "8": (QWORD,),
    "z": (STRING,),
    "s": (0x71, 0x75, 0x76, 0x87, 0x8E, 0x5B24, 0x5B26, 0x5B27, 0x5B2A),
    "t": (DEREF_OF, LOGICAL_NOT, RETURN, 0x5B21, 0x5B22),
    "ss": (0x5B12, 0x5B20),
    "st": (0x86, 0x5B25),
    "s2": (EXTERNAL, 0x5B23),
    "ts": (STORE, 0x80, 0x81, 0x82, 0x96, 0x97, 0x98, 0x99, 0x9D, 0x5B28, 0x5B29),
    "tt": (LOGICAL_AND, LOGICAL_OR, EQUAL, GREATER, LESS),
    "tts": (ADD, 0x73, SUBTRACT, 0x77, SHIFT_LEFT, SHIFT_RIGHT, AND, 0x7C, OR, 0x7E, 0x7F, 0x84, 0x85, INDEX, 0x9C),
    "ttss": (0x78,),
    "ttts": (0x9E,),
    "t1t1tt": (0x89,),
    "tttttt": (0x5B1F,),
    "14t": (0x5B32,),
    "n": (EVENT,),
    "n1": (MUTEX,),
    "ns": (NAME,),
    "sn": (ALIAS,),
    "ttn": (0x8A, 0x8B, 0x8C, 0x8D, 0x8F),
    "tttn": (0x5B13,),
    "n1tt": (REGION,),
    "nttt": (DATA_REGION,),
    "p": (
        SCOPE, BUFFER, PACKAGE, VAR_PACKAGE, METHOD, IF, ELSE, WHILE,
        FIELD, DEVICE, PROCESSOR, POWER, THERMAL_ZONE, INDEX_FIELD, BANK_FIELD,
    ),
}  # fmt: skip
_OPERANDS = {opcode: kinds for kinds, opcodes in _OPCODES.items() for opcode in opcodes}


class NotUnderstood(AbsentError):
    """A piece of AML that says nothing to us, or is broken; the message names table and offset."""


class Name(NamedTuple):
    """A name as written: from the root, or so many scopes up from where it stands, then its segments."""

    absolute: bool
    parents: int
    segments: Path

    def __str__(self) -> str:
        return ("\\" if self.absolute else "^" * self.parents) + ".".join(self.segments)


@dataclass(frozen=True, slots=True, kw_only=True)
class Code:
    """The bytes of one table, and the name that errors give it. Every `end` is where the enclosing term ends."""

    place: str
    data: bytes

    def wrong(self, at: int, problem: str) -> NotUnderstood:
        return NotUnderstood(f"{self.place}: offset {at:#x}: {problem}")

    def number(self, at: int, end: int, size: int) -> tuple[int, int]:
        """A little-endian integer of `size` bytes, and the offset after it."""
        if at + size > end:
            raise self.wrong(at, "the code ends in the middle of a term")
        return int.from_bytes(self.data[at : at + size], "little"), at + size

    def string(self, at: int, end: int) -> tuple[str, int]:
        """The text of a String term, after its opcode."""
        stop = self.data.find(0, at, end)
        if stop < 0:
            raise self.wrong(at, "a string has no end")
        return self.data[at:stop].decode("ascii", "replace"), stop + 1

    def opcode(self, at: int, end: int) -> tuple[int, int]:
        """One- and two-byte opcodes alike as an integer, the latter as 0x5Bxx."""
        if at >= end:
            raise self.wrong(at, "the code ends in the middle of a term")
        code = self.data[at]
        if code != _EXTENDED:
            return code, at + 1
        low, after = self.number(at + 1, end, 1)
        return code << 8 | low, after

    def length(self, at: int, end: int) -> tuple[int, int]:
        """A PkgLength as a bare number, as the widths in a field list are written."""
        lead, after = self.number(at, end, 1)
        more = lead >> 6
        if not more:
            return lead, after
        if lead & 0x30:
            raise self.wrong(at, "a length sets bits that must be zero")
        high, after = self.number(after, end, more)
        return high << 4 | lead & 0x0F, after

    def extent(self, at: int, end: int) -> tuple[int, int]:
        """The contents of a term that begins with its length: where they start and end."""
        length, start = self.length(at, end)
        if not start <= at + length <= end:
            raise self.wrong(at, "a length reaches out of its enclosing term")
        return start, at + length

    def is_name(self, at: int, end: int) -> bool:
        return at < end and self.data[at] in _NAME_FIRST

    def name(self, at: int, end: int) -> tuple[Name, int]:
        absolute, parents = self.data[at : at + 1] == b"\\", 0
        at += absolute
        while not absolute and at < end and self.data[at] == _PARENT:
            parents, at = parents + 1, at + 1
        lead, after = self.number(at, end, 1)
        if lead == _NULL_NAME:
            return Name(absolute, parents, ()), after
        if lead == _DUAL_NAME:
            count, at = 2, after
        elif lead == _MULTI_NAME:
            count, at = self.number(after, end, 1)
        else:
            count = 1
        return Name(absolute, parents, self._segments(at, end, count)), at + 4 * count

    def _segments(self, at: int, end: int, count: int) -> Path:
        if at + 4 * count > end:
            raise self.wrong(at, "the code ends in the middle of a name")
        segments = []
        for start in range(at, at + 4 * count, 4):
            segment = self.data[start : start + 4]
            if segment[0] not in _SEGMENT_FIRST or not _SEGMENT_REST.issuperset(segment):
                raise self.wrong(start, "neither a name nor an opcode that is known")
            segments.append(segment.decode("ascii"))
        return tuple(segments)


ArgumentCount = Callable[[Name], "int | None"]


def operands(opcode: int) -> str | None:
    """What follows an opcode, in the letters of the table above; None where the opcode is unknown."""
    return _OPERANDS.get(opcode)


def skip(code: Code, at: int, end: int, arguments: ArgumentCount, kinds: str = "t") -> int:
    """The offset after the operands of these kinds, by default after one term.

    `arguments` says how many arguments a call of that name takes (0 for what is no method); None is "unknown", and
    then where the term ends is unknown as well. Raises NotUnderstood.
    """
    pending = list(reversed(kinds))
    while pending:
        kind = pending.pop()
        if kind in "ts" and not code.is_name(at, end):
            opcode, after = code.opcode(at, end)
            following = _OPERANDS.get(opcode)
            if following is None:
                raise code.wrong(at, f"unknown opcode {opcode:#x}")
            at = after
            pending.extend(reversed(following))
        elif kind in "tsn":
            name, after = code.name(at, end)
            count = arguments(name) if kind == "t" else 0
            if count is None:
                raise code.wrong(at, f"{name} is not known, nor how many arguments it takes")
            at = after
            pending.extend("t" * count)
        elif kind == "p":
            _, at = code.extent(at, end)
        elif kind == "z":
            _, at = code.string(at, end)
        else:
            _, at = code.number(at, end, int(kind))
    return at
