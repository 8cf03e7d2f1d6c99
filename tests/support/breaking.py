# SPDX-License-Identifier: Apache-2.0
"""vmfork broken on purpose, in a copy of the last commit: a test that stays green whatever is broken proves nothing."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

TOP = Path(__file__).resolve().parents[2]


class Change(Protocol):
    """In `file` the only `sound` text becomes `broken`."""

    @property
    def name(self) -> str: ...
    @property
    def file(self) -> str: ...
    @property
    def sound(self) -> str: ...
    @property
    def broken(self) -> str: ...


@contextmanager
def checkout() -> Iterator[Path]:
    """A copy of the last commit, gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="vmfork-breaks.") as directory:
        copy = Path(directory) / "vmfork"
        subprocess.run(["git", "clone", "--quiet", "--shared", os.fspath(TOP), os.fspath(copy)], check=True)
        yield copy


def apply(copy: Path, one: Change) -> None:
    """Break it. Raises ValueError where the sound text is not there exactly once."""
    path = copy / one.file
    text = path.read_text()
    if text.count(one.sound) != 1:
        raise ValueError(f"{one.file}: the text to break is there {text.count(one.sound)} times: {one.sound.strip()}")
    path.write_text(text.replace(one.sound, one.broken))


def is_chosen(one: Change, words: Sequence[str]) -> bool:
    """Whether one of these words is in the name of the break; without words all are chosen."""
    return not words or any(word in one.name for word in words)
