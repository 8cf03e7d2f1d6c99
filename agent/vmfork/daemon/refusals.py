# SPDX-License-Identifier: Apache-2.0
"""What a disk or /run refused: a problem to report and to make good later, never a reason to stop."""

from __future__ import annotations

import logging
from collections.abc import Callable

from vmfork.errors import InputError

log = logging.getLogger(__name__)


class Refusals:
    """`problems` maps a file to the sentence that says what is wrong with it now.

    `refused` is called when a file did not take what was written.
    """

    def __init__(self) -> None:
        self.problems: dict[str, str] = {}
        self.refused: Callable[[], None] = lambda: None
        self._again: dict[str, Callable[[], object]] = {}

    def attempt(self, what: str, write: Callable[[], object], *, again: bool = False) -> bool:
        """Change a file; False if that was refused. With `again`, `try_again` then does the same once more."""
        try:
            write()
        except (OSError, InputError) as error:
            reason = error.strerror if isinstance(error, OSError) else error.problem
            if what not in self.problems:
                log.error("%s: %s", what, reason)
            self.problems[what] = f"{what}: {reason}"
            if again:
                self._again[what] = write
            self.refused()
            return False
        if what in self.problems:
            del self.problems[what]
            self._again.pop(what, None)
        return True

    def try_again(self) -> None:
        """Repeat what was refused and is to be repeated as it was."""
        for what, write in list(self._again.items()):
            self.attempt(what, write, again=True)

    @property
    def is_behind(self) -> bool:
        """Whether a file, or its directory, did not take what was last written to it."""
        return any(not what.endswith(".broken") for what in self.problems)
