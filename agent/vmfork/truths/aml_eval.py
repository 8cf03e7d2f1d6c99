# SPDX-License-Identifier: Apache-2.0
"""Evaluate one object of an ACPI namespace to a value, for the small methods that hypervisors write.

Understood are integers, strings and packages, names and fields in system memory, locals, integer arithmetic and
comparison, Store, Index, DerefOf, If, Else and Return. Everything else (calls, arguments, loops, buffers, other
address spaces) is NotUnderstood: no value is better than a guess. Nothing is ever written outside of this evaluation,
and its depth and its number of terms are bounded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from vmfork.errors import AbsentError
from vmfork.truths import aml_code as aml
from vmfork.truths.aml_code import Code, Name, NotUnderstood, Path, skip
from vmfork.truths.aml_namespace import Namespace
from vmfork.truths.aml_objects import Data, Field, Method, Region
from vmfork.truths.aml_values import COMPARISONS, OPERATORS, Element, Package, Value

ReadMemory = Callable[[int, int], bytes]
"""Reads guest-physical memory: address, size in bytes. Raises AbsentError where that is refused."""

_MAXIMUM_DEPTH = 32
_MAXIMUM_TERMS = 10_000
_SYSTEM_MEMORY = 0
_ADDRESS_END = 1 << 52
_VALUES = frozenset({aml.ZERO, aml.ONE, aml.ONES, *aml.NUMBER_SIZES, aml.STRING, aml.PACKAGE})


@dataclass(slots=True)
class _Frame:
    """Code being run: its table, where it ends, the scope that its names are looked up in, and its locals."""

    code: Code
    end: int
    scope: Path
    locals: list[Value | None] = field(default_factory=lambda: [None] * 8)


class Evaluator:
    """One evaluation over a namespace; `mask` cuts integers to the width that the DSDT's revision sets."""

    def __init__(self, namespace: Namespace, read_memory: ReadMemory, *, mask: int) -> None:
        self._namespace = namespace
        self._read_memory = read_memory
        self._mask = mask
        self._terms = 0
        self._values: dict[Path, Value] = {}

    def value(self, path: Path) -> Value:
        """What the Name or the Method without arguments at `path` evaluates to; NotUnderstood, or AbsentError from
        the memory that a field stands in."""
        made = self._namespace.objects.get(path)
        if isinstance(made, Method) and made.arguments == 0:
            result = self._block(_Frame(made.code, made.end, path), made.start, made.end, 0)
            if result is None:
                raise made.code.wrong(made.start, "the method returns nothing")
            return result
        return self._named(path[:-1], Name(absolute=True, parents=0, segments=path), 0)

    def _block(self, frame: _Frame, at: int, end: int, depth: int) -> Value | None:
        """Run terms one after the other; the value of the first Return, None where there was none."""
        while at < end:
            opcode, after = (None, at) if frame.code.is_name(at, end) else frame.code.opcode(at, end)
            match opcode:
                case aml.RETURN:
                    return self._term(frame, after, depth)[0]
                case aml.IF:
                    result, at = self._condition(frame, after, end, depth)
                    if result is not None:
                        return result
                case aml.NAME:
                    name, after = frame.code.name(after, end)
                    if len(name.segments) != 1 or name.absolute or name.parents:
                        raise frame.code.wrong(at, f"a method that declares {name} is not understood")
                    made, at = self._term(frame, after, depth)
                    self._values[frame.scope + name.segments] = made
                case aml.STORE | aml.ADD | aml.SUBTRACT | aml.AND | aml.OR | aml.SHIFT_LEFT | aml.SHIFT_RIGHT:
                    _, at = self._term(frame, at, depth)
                case aml.NO_OPERATION:
                    at = after
                case _:
                    raise frame.code.wrong(at, "a statement that is not understood")
        if at != end:
            raise frame.code.wrong(end, "a term reaches out of its enclosing term")
        return None

    def _condition(self, frame: _Frame, at: int, end: int, depth: int) -> tuple[Value | None, int]:
        """An If with the Else that may follow it: the value of a Return inside, and the offset after both."""
        start, at = frame.code.extent(at, end)
        predicate, start = self._integer(frame, start, depth)
        branch: tuple[int, int] | None = (start, at) if predicate else None
        if at < end and not frame.code.is_name(at, end):
            opcode, after = frame.code.opcode(at, end)
            if opcode == aml.ELSE:
                otherwise = frame.code.extent(after, end)
                branch, at = branch or otherwise, otherwise[1]
        if branch is None:
            return None, at
        self._count(frame, at, depth)
        return self._block(frame, *branch, depth + 1), at

    def _count(self, frame: _Frame, at: int, depth: int) -> None:
        self._terms += 1
        if depth > _MAXIMUM_DEPTH or self._terms > _MAXIMUM_TERMS:
            raise frame.code.wrong(at, "is too long or nested too deeply")

    def _term(self, frame: _Frame, at: int, depth: int) -> tuple[Value, int]:
        """The value of one term, and the offset after it."""
        self._count(frame, at, depth)
        code, end = frame.code, frame.end
        if code.is_name(at, end):
            name, after = code.name(at, end)
            return self._named(frame.scope, name, depth), after
        opcode, after = code.opcode(at, end)
        match opcode:
            case aml.ZERO | aml.ONE:
                return opcode, after
            case aml.ONES:
                return self._mask, after
            case aml.BYTE | aml.WORD | aml.DWORD | aml.QWORD:
                number, after = code.number(after, end, aml.NUMBER_SIZES[opcode])
                return number & self._mask, after
            case aml.STRING:
                return code.string(after, end)
            case aml.PACKAGE:
                return self._package(frame, after, depth)
            case aml.STORE:
                stored, after = self._term(frame, after, depth + 1)
                return stored, self._store(frame, after, stored, depth)
            case aml.INDEX:
                return self._index(frame, after, depth)
            case aml.DEREF_OF:
                reference, after = self._term(frame, after, depth + 1)
                return self._dereferenced(frame, at, reference), after
            case _ if aml.LOCAL0 <= opcode <= aml.LOCAL7:
                local = frame.locals[opcode - aml.LOCAL0]
                if local is None:
                    raise code.wrong(at, "a local variable is used before it has a value")
                return local, after
        return self._computed(frame, at, opcode, after, depth)

    def _computed(self, frame: _Frame, at: int, opcode: int, after: int, depth: int) -> tuple[Value, int]:
        """An operator on one or two integers, the arithmetic ones with a target."""
        if opcode == aml.LOGICAL_NOT:
            operand, after = self._integer(frame, after, depth + 1)
            return (0 if operand else self._mask), after
        if opcode not in OPERATORS and opcode not in COMPARISONS:
            raise frame.code.wrong(at, f"opcode {opcode:#x} is not understood here")
        left, after = self._integer(frame, after, depth + 1)
        right, after = self._integer(frame, after, depth + 1)
        if opcode in COMPARISONS:
            return (self._mask if COMPARISONS[opcode](left, right) else 0), after
        result = OPERATORS[opcode](left, right) & self._mask
        return result, self._store(frame, after, result, depth)

    def _integer(self, frame: _Frame, at: int, depth: int) -> tuple[int, int]:
        operand, after = self._term(frame, at, depth + 1)
        if not isinstance(operand, int):
            raise frame.code.wrong(at, "is no integer")
        return operand, after

    def _package(self, frame: _Frame, at: int, depth: int) -> tuple[Package, int]:
        """A literal package. An element of a kind that is not read is None: it matters only to who uses it."""
        code = frame.code
        at, end = code.extent(at, frame.end)
        count, at = code.number(at, end, 1)
        elements: list[Value | None] = [None] * count
        inside = _Frame(code, end, frame.scope, frame.locals)
        for index in range(count):
            if at >= end:
                break
            if code.is_name(at, end) or code.opcode(at, end)[0] in _VALUES:
                elements[index], at = self._term(inside, at, depth + 1)
            elif code.opcode(at, end)[0] in (aml.BUFFER, aml.VAR_PACKAGE):
                at = skip(code, at, end, lambda _: 0)
            else:
                raise code.wrong(at, "a package holds something that is no data")
        return Package(elements), end

    def _index(self, frame: _Frame, at: int, depth: int) -> tuple[Element, int]:
        package, after = self._term(frame, at, depth + 1)
        index, after = self._integer(frame, after, depth + 1)
        if not isinstance(package, Package) or index >= len(package.elements):
            raise frame.code.wrong(at, "is no package, or is indexed beyond its end")
        element = Element(package, index)
        return element, self._store(frame, after, element, depth)

    def _dereferenced(self, frame: _Frame, at: int, reference: Value) -> Value:
        found = reference.package.elements[reference.index] if isinstance(reference, Element) else None
        if found is None:
            raise frame.code.wrong(at, "is no reference to a value")
        return found

    def _store(self, frame: _Frame, at: int, stored: Value, depth: int) -> int:
        """Put a value where the target at `at` says; the offset after it."""
        code, end = frame.code, frame.end
        # What is stored is a copy: a package in two variables is two packages (ACPI 6.5, 19.6.133).
        stored = Package(list(stored.elements)) if isinstance(stored, Package) else stored
        if code.is_name(at, end):
            name, after = code.name(at, end)
            path = self._path(frame.scope, name)
            # Storing into a Name converts to the type that it has.
            if path is None or type(self._named(frame.scope, name, depth)) is not type(stored):
                raise code.wrong(at, f"storing into {name} is not understood")
            self._values[path] = stored
            return after
        opcode, after = code.opcode(at, end)
        if aml.LOCAL0 <= opcode <= aml.LOCAL7:
            frame.locals[opcode - aml.LOCAL0] = stored
        elif opcode == aml.INDEX:
            element, after = self._index(frame, after, depth + 1)
            element.package.elements[element.index] = stored
        elif opcode != aml.ZERO:
            raise code.wrong(at, f"storing into opcode {opcode:#x} is not understood")
        return after

    def _path(self, scope: Path, name: Name) -> Path | None:
        """The path of the data object that a name means."""
        for path in self._namespace.candidates(scope, name):
            if path in self._values:
                return path
            if path in self._namespace.objects:
                break
        found = self._namespace.find(scope, name)
        return found[0] if found is not None and isinstance(found[1], Data) else None

    def _named(self, scope: Path, name: Name, depth: int) -> Value:
        path = self._path(scope, name)
        if path is not None and path in self._values:
            return self._values[path]
        found = self._namespace.find(scope, name)
        if found is None:
            raise NotUnderstood(f"{name} is not declared in any table that was read")
        path, made = found
        if isinstance(made, Field):
            return self._field(made, name, depth)
        if not isinstance(made, Data):
            raise NotUnderstood(f"{name} {getattr(made, 'why', 'is no data object')}")
        if made.code.is_name(made.at, made.end):
            raise made.code.wrong(made.at, f"{name} is only a reference")
        self._values[path], _ = self._term(_Frame(made.code, made.end, path[:-1]), made.at, depth + 1)
        return self._values[path]

    def _field(self, made: Field, name: Name, depth: int) -> int:
        """Read a field, as the interpreter does when a method of the table names it."""
        found = self._namespace.find(made.scope, made.region)
        if found is None or not isinstance(found[1], Region):
            raise NotUnderstood(f"{name} is a field of {made.region}, which is no known region")
        region = found[1]
        frame = _Frame(region.code, region.end, region.scope)
        space, at = region.code.number(region.at, region.end, 1)
        start, at = self._integer(frame, at, depth + 1)
        length, _ = self._integer(frame, at, depth + 1)
        address, size = start + made.bit // 8, made.bits // 8
        if space != _SYSTEM_MEMORY or made.bit % 8 or made.bits not in (8, 16, 32, 64):
            raise NotUnderstood(f"{name} is no whole number in system memory")
        if made.bit + made.bits > 8 * length or address + size > _ADDRESS_END:
            raise NotUnderstood(f"{name} lies outside of its region {made.region}")
        try:
            return int.from_bytes(self._read_memory(address, size), "little") & self._mask
        except AbsentError as error:
            raise AbsentError(f"the field {name} cannot be read: {error}", hint=error.hint) from error
