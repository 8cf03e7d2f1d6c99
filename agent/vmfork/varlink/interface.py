# SPDX-License-Identifier: Apache-2.0
"""Varlink interface files of this package: their text for GetInterfaceDescription, their methods for checking values.

Reads the part of the interface language that the package's own files use: structs by name, `?`, `[]`, `[string]` and
the basic types. A file is read when it is first needed. Anything else in a file is an InputError: it is our own file,
and a wrong one is a broken installation.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from vmfork.errors import InputError
from vmfork.jsonfields import JsonValue

SERVICE = "org.varlink.service"
VMFORK = "io.vmfork"

_TOKEN = re.compile(r"\s+|#[^\n]*|(?P<token>->|\[string\]|\[\]|[(),:?]|[A-Za-z][A-Za-z0-9_.]*)")
_BASIC = ("bool", "int", "float", "string", "object")


@dataclass(frozen=True, slots=True, kw_only=True)
class Type:
    """A type as written: `name` is a basic type, a struct of the interface, or `[]` or `[string]` with an element."""

    name: str
    optional: bool = False
    element: Type | None = None


Struct = Mapping[str, Type]


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """What a method takes and what it answers."""

    parameters: Struct
    reply: Struct


@dataclass(frozen=True, slots=True, kw_only=True)
class Interface:
    """One interface: `text` as installed, and what it declares, by unqualified name."""

    name: str
    text: str
    types: Mapping[str, Struct]
    methods: Mapping[str, Method]
    errors: Mapping[str, Struct]

    def misfit(self, struct: Struct, values: Mapping[str, JsonValue]) -> str | None:
        """The first field of `values` that `struct` does not know or that has another type; None if all fit."""
        for name in values:
            if name not in struct:
                return name
        for name, kind in struct.items():
            if not self._fits(kind, values.get(name)):
                return name
        return None

    def _fits(self, kind: Type, value: JsonValue) -> bool:
        if value is None:
            return kind.optional
        if kind.element is not None:
            if kind.name == "[]":
                return isinstance(value, list) and all(self._fits(kind.element, item) for item in value)
            return isinstance(value, dict) and all(self._fits(kind.element, item) for item in value.values())
        match kind.name:
            case "bool":
                return isinstance(value, bool)
            case "int":
                # Wider than a signed 64-bit number: generations and clocks in nanoseconds are unsigned.
                return isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**64
            case "float":
                return isinstance(value, int | float) and not isinstance(value, bool)
            case "string":
                return isinstance(value, str)
            case "object":
                return isinstance(value, dict)
            case _:
                return isinstance(value, dict) and self.misfit(self.types[kind.name], value) is None


@functools.cache
def load(name: str) -> Interface:
    """The interface of this name from the file beside this module."""
    path = os.path.join(os.path.dirname(__file__), f"{name}.varlink")
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
    except OSError as error:
        raise InputError(path, f"cannot be read: {error.strerror}", hint="reinstall vmfork") from error
    return parse(text, path)


def parse(text: str, place: str) -> Interface:
    """An interface from its text; InputError names `place` and what was not understood."""
    return _Parser(text, place).interface()


class _Parser:
    def __init__(self, text: str, place: str) -> None:
        self._text = text
        self._place = place
        self._tokens = self._split()

    def interface(self) -> Interface:
        self._expect("interface")
        name = self._word()
        types: dict[str, Struct] = {}
        methods: dict[str, Method] = {}
        errors: dict[str, Struct] = {}
        while self._tokens:
            keyword, declared = self._word(), self._word()
            if keyword == "type":
                types[declared] = self._struct()
            elif keyword == "error":
                errors[declared] = self._struct()
            elif keyword == "method":
                parameters = self._struct()
                self._expect("->")
                methods[declared] = Method(parameters=parameters, reply=self._struct())
            else:
                raise self._wrong(keyword)
        found = Interface(name=name, text=self._text, types=types, methods=methods, errors=errors)
        self._check_names(found)
        return found

    def _split(self) -> list[str]:
        """The tokens, last first, so that the next one is popped from the end."""
        tokens, position = [], 0
        while position < len(self._text):
            match = _TOKEN.match(self._text, position)
            if match is None:
                raise self._wrong(self._text[position])
            if match["token"]:
                tokens.append(match["token"])
            position = match.end()
        return tokens[::-1]

    def _wrong(self, token: str) -> InputError:
        return InputError(self._place, f"is no varlink interface that vmfork understands, at {token!r}")

    def _next(self) -> str:
        if not self._tokens:
            raise self._wrong("the end")
        return self._tokens.pop()

    def _expect(self, wanted: str) -> None:
        token = self._next()
        if token != wanted:
            raise self._wrong(token)

    def _word(self) -> str:
        token = self._next()
        if not token[0].isalpha():
            raise self._wrong(token)
        return token

    def _struct(self) -> Struct:
        fields: dict[str, Type] = {}
        self._expect("(")
        if self._tokens and self._tokens[-1] == ")":
            self._next()
            return fields
        while True:
            name = self._word()
            self._expect(":")
            fields[name] = self._type()
            token = self._next()
            if token == ")":
                return fields
            if token != ",":
                raise self._wrong(token)

    def _type(self) -> Type:
        token = self._next()
        if token == "?":
            inner = self._type()
            return Type(name=inner.name, optional=True, element=inner.element)
        if token in ("[]", "[string]"):
            return Type(name=token, element=self._type())
        if not token[0].isalpha():
            raise self._wrong(token)
        return Type(name=token)

    def _check_names(self, interface: Interface) -> None:
        structs = [*interface.types.values(), *interface.errors.values()]
        for method in interface.methods.values():
            structs += [method.parameters, method.reply]
        for struct in structs:
            for kind in struct.values():
                while kind.element is not None:
                    kind = kind.element
                if kind.name not in _BASIC and kind.name not in interface.types:
                    raise self._wrong(kind.name)
