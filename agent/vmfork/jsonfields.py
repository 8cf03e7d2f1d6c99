# SPDX-License-Identifier: Apache-2.0
"""Typed access to JSON that somebody else wrote: a state file, a varlink message, a newer version of vmfork.

`Fields` wraps one JSON object and the name of the place it came from. Each getter either returns a value of the asked
type or raises InputError with the place and the field; unknown fields are ignored, so a newer writer can be read.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from enum import StrEnum

from vmfork.annotations import TypeVar
from vmfork.errors import InputError

E = TypeVar("E", bound=StrEnum)

JsonValue = None | bool | int | float | str | list["JsonValue"] | dict[str, "JsonValue"]
JsonObject = dict[str, JsonValue]


def parse_object(text: str | bytes, place: str) -> Fields:
    """One JSON object from text; anything else is an InputError that names `place`."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(place, f"is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise InputError(place, "is not a JSON object")
    return Fields(value, place)


class Fields:
    """One JSON object from outside, read field by field."""

    __slots__ = ("_object", "place")

    def __init__(self, obj: Mapping[str, JsonValue], place: str) -> None:
        self._object = obj
        self.place = place

    def wrong(self, name: str, wanted: str) -> InputError:
        return InputError(self.place, f"field {name!r} is not {wanted}")

    def __contains__(self, name: str) -> bool:
        return self._object.get(name) is not None

    def __iter__(self) -> Iterator[str]:
        return iter(self._object)

    def integer_or_none(self, name: str, *, minimum: int = 0, maximum: int = 2**64 - 1) -> int | None:
        value = self._object.get(name)
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool) or not minimum <= value <= maximum:
            raise self.wrong(name, f"an integer from {minimum} to {maximum}")
        return value

    def integer(self, name: str, *, minimum: int = 0, maximum: int = 2**64 - 1) -> int:
        value = self.integer_or_none(name, minimum=minimum, maximum=maximum)
        if value is None:
            raise self.wrong(name, "there")
        return value

    def text_or_none(self, name: str) -> str | None:
        value = self._object.get(name)
        if value is not None and not isinstance(value, str):
            raise self.wrong(name, "a string")
        return value

    def text(self, name: str) -> str:
        value = self.text_or_none(name)
        if value is None:
            raise self.wrong(name, "there")
        return value

    def flag(self, name: str, *, default: bool = False) -> bool:
        value = self._object.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.wrong(name, "true or false")
        return value

    def hex_or_none(self, name: str, *, size: int | None = None) -> bytes | None:
        """Bytes written as hex digits; with `size`, exactly so many bytes."""
        text = self.text_or_none(name)
        if text is None:
            return None
        try:
            value = bytes.fromhex(text)
        except ValueError as error:
            raise self.wrong(name, "hex digits") from error
        if size is not None and len(value) != size:
            raise self.wrong(name, f"{size} bytes in hex digits")
        return value

    def choice(self, name: str, kind: type[E]) -> E:
        text = self.text(name)
        try:
            return kind(text)
        except ValueError as error:
            raise self.wrong(name, "one of " + ", ".join(kind)) from error

    def texts(self, name: str) -> tuple[str, ...]:
        value = self._object.get(name)
        if not isinstance(value, list):
            raise self.wrong(name, "a list of strings")
        if not all(isinstance(item, str) for item in value):
            raise self.wrong(name, "a list of strings")
        return tuple(str(item) for item in value)

    def object_or_none(self, name: str) -> Fields | None:
        value = self._object.get(name)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.wrong(name, "an object")
        return Fields(value, f"{self.place}: {name}")

    def object(self, name: str) -> Fields:
        value = self.object_or_none(name)
        if value is None:
            raise self.wrong(name, "there")
        return value

    def objects(self, name: str) -> tuple[Fields, ...]:
        value = self._object.get(name)
        if not isinstance(value, list):
            raise self.wrong(name, "a list of objects")
        found = []
        for number, item in enumerate(value):
            if not isinstance(item, dict):
                raise self.wrong(name, "a list of objects")
            found.append(Fields(item, f"{self.place}: {name}[{number}]"))
        return tuple(found)
