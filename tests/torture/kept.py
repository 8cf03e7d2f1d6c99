# SPDX-License-Identifier: Apache-2.0
"""The inputs that are kept: each target's directory of files that a person can read, and how large it may become."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

CORPUS = Path(__file__).with_name("corpus")
# For each target: every test run tries all of them, and the fuzzer begins with them.
MOST_FILES = 40
MOST_BYTES = 32 << 10
_LONGEST = 2048


def seeds(name: str, corpus: Path = CORPUS) -> dict[str, bytes]:
    """The kept inputs of a target: text as it is in `.txt`, anything else as hex digits in `.hex`."""
    found = {path.name: path.read_bytes() for path in sorted(corpus.joinpath(name).glob("*.txt"))}
    for path in sorted(corpus.joinpath(name).glob("*.hex")):
        found[path.name] = bytes.fromhex(path.read_text())
    return found


def write(name: str, file: str, data: bytes, corpus: Path = CORPUS) -> None:
    """Keep one input as hex digits."""
    text = data.hex()
    lines = "\n".join(text[at : at + 96] for at in range(0, len(text), 96))
    (corpus / name / f"{file}.hex").write_text(lines + "\n")


def keep(name: str, interesting: Iterable[bytes], corpus: Path = CORPUS) -> int:
    """Keep inputs that reach what the others do not, the shortest first, as far as there is room; returns how many."""
    there = set(seeds(name, corpus).values())
    room, files, kept = MOST_BYTES - sum(map(len, there)), MOST_FILES - len(there), 0
    for data in sorted(set(interesting) - there, key=lambda one: (len(one), one)):
        if kept == files or len(data) > min(room, _LONGEST):
            break
        write(name, f"reached-{hashlib.sha256(data).hexdigest()[:12]}", data, corpus)
        room, kept = room - len(data), kept + 1
    return kept
