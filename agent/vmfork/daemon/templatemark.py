# SPDX-License-Identifier: Apache-2.0
"""The mark of a template: a file on disk for clones of its disk, one in /run for clones of the running guest.

Each clone uses it up. A mark that was used up counts no more even where a file of it cannot be removed: it would give
the same clone a new identity at each of its forks.
"""

from __future__ import annotations

import os
from functools import partial

from vmfork import atomicfile
from vmfork.daemon.ledger import Ledger
from vmfork.errors import VmforkError
from vmfork.paths import Paths
from vmfork.state import Remembered

_TEXT = b"declared a template by vmforkctl prepare --template\n"


def stands(paths: Paths, remembered: Remembered) -> bool:
    """Whether this guest is a template, or a clone of one that has not used the mark up."""
    return not remembered.mark_used_up and any(os.path.lexists(path) for path in _files(paths))


class TemplateMark:
    """Leaves the mark and removes it, for the daemon."""

    def __init__(self, paths: Paths, ledger: Ledger) -> None:
        self._paths = paths
        self._ledger = ledger
        if ledger.remembered.mark_used_up:
            self.remove()

    def leave(self) -> None:
        """Declare this guest a template; VmforkError if a file was refused, and then it is none."""
        refusals = self._ledger.refusals
        for path in _files(self._paths):
            if not refusals.attempt(path, partial(atomicfile.replace, path, _TEXT, durable=True)):
                reason = refusals.problems[path]
                self.remove()
                raise VmforkError(f"this guest cannot be declared a template: {reason}")
        if self._ledger.remembered.mark_used_up:
            self._ledger.note(mark_used_up=False)

    def remove(self) -> None:
        """A clone used the mark up, or the template goes on as itself. What cannot be removed now is removed later."""
        gone = True
        for path in _files(self._paths):
            gone &= self._ledger.refusals.attempt(path, partial(_remove, path), again=True)
        if self._ledger.remembered.mark_used_up is gone:
            self._ledger.note(mark_used_up=not gone)


def _files(paths: Paths) -> tuple[str, str]:
    # The disk is the one that may refuse: asked first, it leaves nothing to be taken back.
    return paths.template_mark, paths.template_mark_run


def _remove(path: str) -> None:
    try:
        os.lstat(path)
    except FileNotFoundError:
        # Not left to unlink: on a read-only disk Linux answers EROFS before it looks for the file.
        return
    os.unlink(path)
    # A power cut must not bring it back.
    atomicfile.sync_directory(os.path.dirname(path))
