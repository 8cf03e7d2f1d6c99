# SPDX-License-Identifier: Apache-2.0
"""The ACPI namespace as its tables declare it: which object stands at which path, and where its code is.

Tables are walked without running them. Code inside of a method declares nothing here; code that only runs under a
condition declares nothing but what is below the device asked for, because that device is known to exist. Whatever is
declared twice, or in a way that is not read here, becomes Opaque: a name that is taken, with no meaning. Time is
linear in the tables' size; path length and number of objects are bounded.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from vmfork.truths import aml_code as aml
from vmfork.truths.aml_code import Code, Name, NotUnderstood, Path, operands, skip
from vmfork.truths.aml_objects import Alias, Data, Field, Method, Object, Opaque, Region

_HEADER_SIZE = 36
_MAXIMUM_PATH = 64
_MAXIMUM_OBJECTS = 1 << 18
_MAXIMUM_ALIASES = 8
_MAXIMUM_PROBLEMS = 16

# Made by the interpreter itself (ACPI 6.5, 5.3.1 and 5.7); Scope() may open them from everywhere.
_PREDEFINED_SCOPES = frozenset({"_GPE", "_PR_", "_SB_", "_SI_", "_TZ_"})
_PREDEFINED_ARGUMENTS: dict[Path, int] = {("_OSI",): 1, ("_OS_",): 0, ("_REV",): 0, ("_GL_",): 0}

# Bytes between the name and the terms of what opens a scope.
_SCOPES = {aml.SCOPE: 0, aml.DEVICE: 0, aml.PROCESSOR: 6, aml.POWER: 3, aml.THERMAL_ZONE: 0}
_METHOD_TYPE = 8


class _Frame(NamedTuple):
    """Terms still to be walked."""

    at: int
    end: int
    scope: Path
    conditional: bool


class Namespace:
    """The objects of the tables loaded so far, for questions about what is below `device`."""

    def __init__(self, device: Path) -> None:
        self.objects: dict[Path, Object] = {}
        self.problems: list[NotUnderstood] = []
        self._device = device
        self._unread: set[Path] = set()
        self._arguments = dict(_PREDEFINED_ARGUMENTS)

    def load(self, code: Code) -> None:
        """Add what one table declares (its header is not looked at). Never raises: see `problems`."""
        frames = [_Frame(_HEADER_SIZE, len(code.data), (), conditional=False)]
        while frames:
            frame = frames.pop()
            try:
                self._walk(code, frame, frames)
            except NotUnderstood as problem:
                # Where the next term starts is unknown, so the rest of this scope is; what encloses it is not.
                self._give_up(problem, frame.scope)

    def candidates(self, scope: Path, name: Name) -> Iterator[Path]:
        """Where to look for a name that is used in `scope`, in order (ACPI 6.5, 5.3): single segments also upwards."""
        if name.absolute:
            yield name.segments
        elif name.parents or len(name.segments) != 1:
            if name.parents <= len(scope):
                yield scope[: len(scope) - name.parents] + name.segments
        else:
            for depth in range(len(scope), -1, -1):
                yield scope[:depth] + name.segments

    def find(self, scope: Path, name: Name) -> tuple[Path, Object] | None:
        """The object that a name means in `scope`, and its own path; None where nothing has the name."""
        for _ in range(_MAXIMUM_ALIASES):
            found = self._find_once(scope, name)
            if found is None or not isinstance(found[1], Alias):
                return found
            scope, name = found[1].scope, found[1].name
        return None

    def _find_once(self, scope: Path, name: Name) -> tuple[Path, Object] | None:
        for path in self.candidates(scope, name):
            if path in self.objects:
                return path, self.objects[path]
            if path[:-1] and path[:-1] in self._unread:
                return path, Opaque(why=f"a part of \\{'.'.join(path[:-1])} cannot be read")
        return None

    def _argument_count(self, scope: Path, name: Name) -> int | None:
        found = self.find(scope, name)
        if found is not None:
            return found[1].arguments if isinstance(found[1], Method) else 0
        known = (self._arguments[path] for path in self.candidates(scope, name) if path in self._arguments)
        return next(known, None)

    def _walk(self, code: Code, frame: _Frame, frames: list[_Frame]) -> None:
        """Walk the terms of a frame up to its end, or to a term that opens a frame of its own."""
        at, end = frame.at, frame.end
        while at < end:
            if code.is_name(at, end):
                at = self._skip(code, at, frame)
                continue
            opcode, after = code.opcode(at, end)
            kinds = operands(opcode)
            if kinds == "":
                at = after
            elif kinds == "p":
                start, at = code.extent(after, end)
                inner = self._enclosed(code, frame, opcode, start, at)
                if inner is not None:
                    frames += (frame._replace(at=at), inner)
                    return
            elif kinds is not None and "n" in kinds:
                at = self._declaration(code, frame, opcode, after)
            elif opcode == aml.EXTERNAL:
                at = self._external(code, after, frame)
            else:
                at = self._skip(code, at, frame)

    def _skip(self, code: Code, at: int, frame: _Frame, kinds: str = "t") -> int:
        return skip(code, at, frame.end, lambda name: self._argument_count(frame.scope, name), kinds)

    def _give_up(self, problem: NotUnderstood, scope: Path) -> None:
        """What follows in `scope` may declare any name there."""
        if len(self.problems) < _MAXIMUM_PROBLEMS:
            self.problems.append(problem)
        self._unread.add(scope)

    def _enclosed(self, code: Code, frame: _Frame, opcode: int, start: int, end: int) -> _Frame | None:
        """Declare what a term with a length declares; what is to be walked inside of it, if anything.

        A problem in here costs this term only: its length says where the next one starts.
        """
        inside = frame._replace(at=start, end=end)
        try:
            if opcode in _SCOPES:
                inside = self._scope(code, inside, opcode)
            elif opcode == aml.IF:
                inside = inside._replace(at=self._skip(code, start, inside), conditional=True)
            elif opcode == aml.ELSE:
                inside = inside._replace(conditional=True)
            else:
                self._closed(code, inside, opcode)
                return None
        except NotUnderstood as problem:
            self._give_up(problem, inside.scope)
            return None
        return inside

    def _scope(self, code: Code, frame: _Frame, opcode: int) -> _Frame:
        name, at = code.name(frame.at, frame.end)
        if opcode == aml.SCOPE:
            path = self._opened(frame.scope, name, code, at)
        else:
            path = self._own(frame.scope, name, code, at)
            self._declare(path, Opaque(why="is a device"), frame)
        return frame._replace(at=at + _SCOPES[opcode], scope=path)

    def _closed(self, code: Code, frame: _Frame, opcode: int) -> None:
        """Declare what has a length, but no terms that declare anything in turn."""
        if opcode == aml.METHOD:
            self._method(code, frame)
        elif opcode in (aml.FIELD, aml.INDEX_FIELD, aml.BANK_FIELD):
            self._fields(code, frame, opcode)

    def _method(self, code: Code, frame: _Frame) -> None:
        name, at = code.name(frame.at, frame.end)
        flags, at = code.number(at, frame.end, 1)
        method = Method(code=code, start=at, end=frame.end, arguments=flags & 7)
        self._declare(self._own(frame.scope, name, code, at), method, frame)

    def _declaration(self, code: Code, frame: _Frame, opcode: int, at: int) -> int:
        """A term without a length that declares something; the offset after it."""
        scope, end = frame.scope, frame.end
        made: Object = Opaque(why="is no data object")
        path: Path = ()
        if opcode == aml.ALIAS:
            target, at = code.name(at, end)
            made = Alias(name=target, scope=scope)
        for kind in (operands(opcode) or "").removeprefix("s" if opcode == aml.ALIAS else ""):
            if kind != "n":
                at = self._skip(code, at, frame, kind)
                continue
            name, at = code.name(at, end)
            path = self._own(scope, name, code, at)
            if opcode == aml.NAME:
                made = Data(code=code, at=at, end=end)
            elif opcode == aml.REGION:
                made = Region(code=code, at=at, end=end, scope=scope)
        self._declare(path, made, frame)
        return at

    def _external(self, code: Code, at: int, frame: _Frame) -> int:
        """What the compiler was told of another table's object: needed to find the end of a call."""
        name, at = code.name(at, frame.end)
        kind, at = code.number(at, frame.end, 1)
        count, at = code.number(at, frame.end, 1)
        path = self._own(frame.scope, name, code, at)
        self._arguments.setdefault(path, min(count, 7) if kind == _METHOD_TYPE else 0)
        return at

    def _fields(self, code: Code, frame: _Frame, opcode: int) -> None:
        """The units of a Field; those of IndexField and BankField are reached through writes, so they are opaque."""
        end = frame.end
        region, at = code.name(frame.at, end)
        if opcode != aml.FIELD:
            _, at = code.name(at, end)
        if opcode == aml.BANK_FIELD:
            at = self._skip(code, at, frame)
        _, at = code.number(at, end, 1)
        bit = 0
        while at < end:
            if not code.is_name(at, end):
                gap, at = _unnamed_field(code, at, end)
                bit += gap
                continue
            name, at = code.name(at, end)
            bits, at = code.length(at, end)
            made: Object = Opaque(why="is a field behind a register")
            if opcode == aml.FIELD:
                made = Field(region=region, scope=frame.scope, bit=bit, bits=bits)
            self._declare(self._own(frame.scope, name, code, at), made, frame)
            bit += bits

    def _declare(self, path: Path, made: Object, frame: _Frame) -> None:
        if path in self.objects:
            made = Opaque(why="is declared twice")
        elif frame.conditional and path[: len(self._device)] != self._device:
            made = Opaque(why="is declared under a condition")
        elif len(self.objects) >= _MAXIMUM_OBJECTS:
            raise NotUnderstood(f"more than {_MAXIMUM_OBJECTS} objects in the ACPI namespace")
        self.objects[path] = made

    def _own(self, scope: Path, name: Name, code: Code, at: int) -> Path:
        """The path of an object that is declared in `scope`."""
        path = name.segments if name.absolute else scope[: len(scope) - name.parents] + name.segments
        if name.parents > len(scope) or len(path) > _MAXIMUM_PATH:
            raise code.wrong(at, "a name that leads nowhere")
        return path

    def _opened(self, scope: Path, name: Name, code: Code, at: int) -> Path:
        """The path of a scope that is opened again, which a single segment finds upwards."""
        if not name.absolute and not name.parents and len(name.segments) == 1:
            known = (path for path in self.candidates(scope, name) if path in self.objects)
            root = name.segments if name.segments[0] in _PREDEFINED_SCOPES else None
            return next(known, None) or root or self._own(scope, name, code, at)
        return self._own(scope, name, code, at)


def _unnamed_field(code: Code, at: int, end: int) -> tuple[int, int]:
    """A gap, an access or a connection in a field list: its width in bits, and the offset after it."""
    kind, at = code.number(at, end, 1)
    match kind:
        case 0x00:
            return code.length(at, end)
        case 0x01:
            return 0, code.number(at, end, 2)[1]
        case 0x02:
            # A connection is a name or a buffer, and neither takes arguments.
            return 0, skip(code, at, end, lambda _: 0)
        case 0x03:
            return 0, code.number(at, end, 3)[1]
    raise code.wrong(at - 1, "unknown kind of field")
