# SPDX-License-Identifier: Apache-2.0
"""What an action is: the package's own repair that a shipped hook calls, and the context it gets.

An action is idempotent and may be killed at any instant and repeated. It checks its tools before it removes anything,
verifies its effect rather than its calls, and in a dry run says exactly what it would do and changes nothing. It ends
by returning (done), or by raising ActionSkipped (nothing to do here, with the reason), TryAgain, or ActionError.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from vmfork.actions.commands import Commands
from vmfork.annotations import Any, TypeVar
from vmfork.errors import ActionError, ActionSkipped
from vmfork.model import ForkEvent, IdentityPolicy
from vmfork.paths import Paths
from vmfork.settings import Setting

T = TypeVar("T")


class TryAgain(ActionError):
    """The action could not be done yet, but may succeed soon: the hook ends with 75 and is run again."""


class Phase(StrEnum):
    """Why an action runs: a fork happened, a snapshot is about to be taken, or it was taken (or called off)."""

    AFTER_FORK = "after-fork"
    BEFORE_SNAPSHOT = "before-snapshot"
    AFTER_SNAPSHOT = "after-snapshot"


def say_to_stdout(line: str) -> None:
    """One line of a report, at once: hooks are read line by line while they run."""
    print(line, flush=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class ActionContext:
    """All that an action may know and use.

    `settings` are the hook's own keys as written in the configuration; ask for them with `get`. `event` is None when
    a person runs the action by hand. `early` means that a boot is still going on: files may be edited, but nothing may
    be waited for. `run` starts programs. `say` reports one line.
    """

    paths: Paths
    run: Commands
    settings: Mapping[str, str] = field(default_factory=dict)
    event: ForkEvent | None = None
    identity: IdentityPolicy = IdentityPolicy.ROTATE
    phase: Phase = Phase.AFTER_FORK
    dry_run: bool = False
    early: bool = False
    token: bytes = field(default_factory=lambda: os.urandom(16))
    say: Callable[[str], None] = say_to_stdout

    def get(self, setting: Setting[T]) -> T:
        """The value of a setting; a broken value was already reported with its line, so its default is used."""
        try:
            return setting.parse(self.settings.get(setting.key, setting.default))
        except ValueError:
            return setting.parse(setting.default)

    def would(self, deed: str) -> bool:
        """In a dry run: report "would ..." and be True, so that `if context.would(...): return` guards every change."""
        if self.dry_run:
            self.say(f"would {deed}")
        return self.dry_run

    def hook_environment(self) -> Mapping[str, str]:
        """What a command of the admin's is told, by the names of the hook contract."""
        told = {
            "VMFORK_FORK_TOKEN": self.token.hex(),
            "VMFORK_IDENTITY": self.identity.value,
            "VMFORK_DRY_RUN": "1" if self.dry_run else "0",
        }
        if self.event is not None:
            told |= {"VMFORK_GENERATION": str(self.event.generation), "VMFORK_KIND": self.event.kind.value}
        if self.paths.is_fake:
            told["VMFORK_ROOT"] = self.paths.root
        return told

    def require_rotation(self) -> None:
        """ActionSkipped when this guest keeps its identity."""
        if self.identity is IdentityPolicy.KEEP:
            raise ActionSkipped("this guest keeps its identity")


@dataclass(frozen=True, slots=True, kw_only=True)
class Action:
    """One repair: `name` as in `vmforkctl action NAME`, `hook` the shipped hook's name without extension.

    `identity` marks the class that is governed by the identity policy: the framework then skips it for a guest that
    keeps its identity. `keys` are rows of the table in settings.py, of the section `[Hook NN-name]`. A phase without
    a function is skipped.
    """

    name: str
    hook: str
    summary: str
    identity: bool = False
    keys: tuple[Setting[Any], ...] = ()
    after_fork: Callable[[ActionContext], None]
    before_snapshot: Callable[[ActionContext], None] | None = None
    after_snapshot: Callable[[ActionContext], None] | None = None
