# SPDX-License-Identifier: Apache-2.0
"""What the demo says: lines of progress with the time since its start, and blocks of text as they are.

Everything goes to standard output in plain text, no wider than 100 columns; nothing depends on colour.
"""

from __future__ import annotations

import logging
import sys
import textwrap
import threading
import time

WIDTH = 100


class Terminal(logging.Handler):
    """Prints whole blocks, and as a handler what the lab and the scenes log, for several threads."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self._started = time.monotonic()
        self._turn = threading.Lock()
        self._closed = False

    @property
    def elapsed(self) -> float:
        """Seconds since the demo began."""
        return time.monotonic() - self._started

    def emit(self, record: logging.LogRecord) -> None:
        """A line of progress."""
        self.block([f"[{self.elapsed:4.0f} s] {record.getMessage()}"])

    def block(self, lines: list[str]) -> None:
        """Lines that stay together."""
        with self._turn:
            if not self._closed:
                sys.stdout.write("".join(f"{line}\n" for line in lines))
                sys.stdout.flush()

    def close(self) -> None:
        """Say no more, whoever still tries."""
        with self._turn:
            self._closed = True
        super().close()


def wrapped(text: str, *, lead: str = "", indent: int = 0) -> list[str]:
    """A paragraph that starts with `lead` and keeps to its right."""
    margin = " " * (indent + len(lead))
    return textwrap.wrap(
        text,
        WIDTH - 1,
        initial_indent=" " * indent + lead,
        subsequent_indent=margin,
        # A path is for copying.
        break_long_words=False,
        break_on_hyphens=False,
    )
