# SPDX-License-Identifier: Apache-2.0
"""What a detector that was killed leaves behind, before the next one mends it: every file whole, or none."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

from vmfork import history, intent, state
from vmfork.errors import VmforkError
from vmfork.page import MAGIC, PAGE_SIZE
from vmfork.paths import Paths

# Magic, ABI version, seq, state, generation, as docs/generation-page.md has them.
_HEAD = struct.Struct("<4sIIIQ")


def damage(paths: Paths, *, newest: int, last: int) -> Iterator[str]:
    """A sentence for each file that a kill has spoilt; the page stands between these two generations."""
    shown = newest
    page = Path(paths.generation_page)
    if page.exists():
        content = page.read_bytes()
        if len(content) < PAGE_SIZE:
            yield f"the page has {len(content)} bytes"
            return
        magic, abi, _seq, _state, shown = _HEAD.unpack_from(content)
        if (magic, abi) != (MAGIC, 1):
            yield "the page is no page"
        # With seq odd readers wait, and so its fields may be old and new ones. One of them is either all the same.
        if not newest <= shown <= last:
            yield f"the page has generation {shown}, seen was {newest}, sent {last}"
    try:
        saved, remembered = state.load_saved(paths), state.load_remembered(paths)
        noted = intent.load(paths.detector_intent)
        unreadable = history.load(paths).unreadable_lines
    except VmforkError as error:
        yield f"a kill spoilt a file: {error}"
        return
    if unreadable:
        yield f"a kill left {unreadable} lines in the history that cannot be read"
    known = [one.generation for one in (saved, remembered, None if noted is None else noted.event) if one is not None]
    if shown > max(known, default=1):
        yield f"the page shows fork {shown}, of which no file knows"
    yield from _metrics(Path(paths.metrics))


def _metrics(path: Path) -> Iterator[str]:
    if path.exists():
        text = path.read_text()
        if "\nvmfork_detection " not in text or not text.endswith("\n"):
            yield "the metrics are cut short"
