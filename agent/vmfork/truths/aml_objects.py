# SPDX-License-Identifier: Apache-2.0
"""The kinds of object in an ACPI namespace, as far as finding one address needs them.

Each says where its code is, none holds a value: the evaluator reads that when it is asked for.
"""

from __future__ import annotations

from dataclasses import dataclass

from vmfork.truths.aml_code import Code, Name, Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Data:
    """A Name: its data object stands at `at`, before `end`."""

    code: Code
    at: int
    end: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """Its terms stand from `start` to `end`; it takes `arguments`."""

    code: Code
    start: int
    end: int
    arguments: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Region:
    """An OperationRegion: the number of its address space stands at `at`, then the terms of its offset and length."""

    code: Code
    at: int
    end: int
    scope: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Field:
    """A unit of a Field: so many bits, from a bit of the region that `region` names in `scope`."""

    region: Name
    scope: Path
    bit: int
    bits: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Alias:
    """Another name for what `name` means in `scope`."""

    name: Name
    scope: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Opaque:
    """Something stands there, but what it is worth is not known: `why`."""

    why: str


Object = Data | Method | Region | Field | Alias | Opaque
