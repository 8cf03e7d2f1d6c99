# SPDX-License-Identifier: Apache-2.0
"""The one exception tree of vmfork.

Every error says what was tried and where, and carries a hint that says what to do next. Programs print `str(error)`
and then `error.hint`; nothing in the tree ever holds a generation ID, because messages travel to the journal.
"""

from __future__ import annotations


class VmforkError(Exception):
    """Base of everything that vmfork raises on purpose; `hint` is the next step for a person, or None."""

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


class Unavailable(VmforkError):
    """No generation page, or nobody watches: the question "was I forked?" has no answer now."""


class Forked(VmforkError):
    """The virtual machine was forked while a block that must not be interrupted by a fork was running."""


class InputError(VmforkError):
    """A file, device or message holds something that cannot be understood; `place` names it."""

    def __init__(self, place: str, problem: str, *, hint: str | None = None) -> None:
        super().__init__(f"{place}: {problem}", hint=hint)
        self.place = place
        self.problem = problem


class UnreadableError(InputError):
    """A file is there and the kernel refuses to read it: nothing is known of what it holds, so it is not broken."""


class AbsentError(VmforkError):
    """Something that could be there is not, or cannot be read this time; the message says why.

    `passing`: the reason may pass by itself (a full table, an error of a device), so it is worth looking again.
    """

    def __init__(self, message: str, *, hint: str | None = None, passing: bool = False) -> None:
        super().__init__(message, hint=hint)
        self.passing = passing


class ConfigError(InputError):
    """A configuration file has a line, key or value that is not understood."""


class ProtocolError(InputError):
    """A peer on a socket broke the varlink protocol or exceeded a limit."""


class DaemonUnreachable(VmforkError):
    """vmforkd does not answer on its socket."""


class ActionError(VmforkError):
    """An action (one of the package's own repairs) failed, or its effect could not be verified."""


class ActionSkipped(VmforkError):
    """An action has nothing to do on this guest; the message is the reason."""
