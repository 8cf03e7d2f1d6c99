# SPDX-License-Identifier: Apache-2.0
"""What is configured: the assignments of vmfork.conf and its drop-ins, a later file's in place of an earlier one's.

Nothing in a configuration file stops the daemon: what is broken is reported with file, line and key, and the default
is used in its place. The INI dialect is read by hand because configparser forgets line numbers, and because it alone
would take a tenth of the detector's memory.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from vmfork import configfiles, settings
from vmfork.annotations import TypeVar
from vmfork.errors import ConfigError, UnreadableError
from vmfork.paths import Paths
from vmfork.settings import Setting

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """One `Key=value` line."""

    section: str
    key: str
    value: str
    path: str
    line: int

    @property
    def place(self) -> str:
        return f"{self.path}:{self.line}"


@dataclass(frozen=True, slots=True, kw_only=True)
class HookSettings:
    """What `[Hook NN-name]` says: `timeout_sec` is None where the general one holds; `keys` are the hook's own."""

    enable: str = "auto"
    timeout_sec: float | None = None
    keys: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Everything that was configured; `problems` are the complaints to show, each with its file and line.

    `is_whole` is False where the kernel refused to show a part of it, for a reason that may pass.
    """

    assignments: Mapping[tuple[str, str], Assignment] = field(default_factory=dict)
    problems: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    is_whole: bool = True

    def get(self, setting: Setting[T], *, section: str | None = None) -> T:
        """The value of a setting, its default where nothing usable was configured."""
        found = self.assignments.get((section or setting.section, setting.key))
        return setting.parse(setting.default if found is None else found.value)

    def hook(self, name: str) -> HookSettings:
        """The settings of the hook with this name; an extension of the name does not count."""
        section = f"Hook {os.path.splitext(name)[0]}"
        known = {settings.HOOK_ENABLE.key, settings.HOOK_TIMEOUT_SEC.key}
        own = {row.key: row.default for row in settings.HOOK_OWN if row.section == section}
        for (where, key), assignment in self.assignments.items():
            if where == section and key not in known:
                own[key] = assignment.value
        return HookSettings(
            enable=self.get(settings.HOOK_ENABLE, section=section),
            timeout_sec=self.get(settings.HOOK_TIMEOUT_SEC, section=section),
            keys=own,
        )


def load(paths: Paths) -> Config:
    """Read all configuration files; never raises for what stands in them."""
    chosen: dict[tuple[str, str], Assignment] = {}
    complaints = configfiles.Complaints()
    problems = complaints.problems
    files = configfiles.in_order(paths, complaints)
    for path in files:
        try:
            text = configfiles.text_of(paths, path)
        except (ConfigError, UnreadableError) as error:
            problems.append(str(error))
            complaints.unread = complaints.unread or isinstance(error, UnreadableError)
            continue
        for assignment in parse(text, path, problems):
            problem = _check(assignment)
            if problem is None:
                chosen[assignment.section, assignment.key] = assignment
            else:
                problems.append(problem)
                # Not the value of an earlier file: the admin meant to replace that one.
                chosen.pop((assignment.section, assignment.key), None)
    return Config(assignments=chosen, problems=tuple(problems), files=tuple(files), is_whole=not complaints.unread)


def parse(text: str, path: str, problems: list[str]) -> Iterator[Assignment]:
    """The assignments of one file; lines that are none are added to `problems`."""
    section = ""
    for number, raw in enumerate(text.splitlines(), start=1):
        line = raw.strip()
        if not line or line[0] in "#;":
            continue
        if line.startswith("[") and line.endswith("]"):
            section = " ".join(line[1:-1].split())
            continue
        key, equals, value = line.partition("=")
        if not equals:
            problems.append(f"{path}:{number}: neither a section nor Key=value, ignored")
        elif not section:
            problems.append(f"{path}:{number}: {key.strip()}= stands before the first section, ignored")
        else:
            yield Assignment(section=section, key=key.strip(), value=value.strip(), path=path, line=number)


def rows_of(section: str) -> dict[str, Setting[float] | Setting[str] | Setting[bool] | Setting[float | None]]:
    """The settings that a section may hold, by key; empty for an unknown section."""
    if section.startswith("Hook "):
        own = {row.key: row for row in settings.HOOK_OWN if row.section == section}
        return {"Enable": settings.HOOK_ENABLE, "TimeoutSec": settings.HOOK_TIMEOUT_SEC, **own}
    return {row.key: row for row in settings.GENERAL if row.section == section}


def _check(assignment: Assignment) -> str | None:
    rows = rows_of(assignment.section)
    if not rows:
        return f"{assignment.place}: unknown section [{assignment.section}], {assignment.key}= ignored"
    row = rows.get(assignment.key)
    if row is None:
        return f"{assignment.place}: unknown key {assignment.key}= in [{assignment.section}], ignored"
    try:
        row.parse(assignment.value)
    except ValueError as error:
        return f"{assignment.place}: {assignment.key}= must be {error}; using the default {row.default or 'of [React]'}"
    return None
