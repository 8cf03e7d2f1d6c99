# SPDX-License-Identifier: Apache-2.0
"""Reads vmfork.conf and its drop-ins, in the order of UAPI.6: /usr/lib, /run, /etc; a later file wins.

Nothing in a configuration file stops the daemon: what is broken is reported with file, line and key, and the default
is used in its place. A file is obeyed only if nobody but root can have written it: it names commands to run. The INI
dialect is read by hand because configparser forgets line numbers, and because it alone would take a tenth of the
detector's memory.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from vmfork import settings
from vmfork.annotations import TypeVar
from vmfork.atomicfile import may_pass, patiently, read_up_to
from vmfork.errors import ConfigError, UnreadableError
from vmfork.paths import Paths
from vmfork.settings import Setting
from vmfork.trust import Inspector, Untrusted

T = TypeVar("T")

MAIN = "vmfork.conf"
_MAX_BYTES = 1 << 20


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


@dataclass(slots=True, kw_only=True)
class Complaints:
    """What is wrong so far; `unread` once something could not be read for a reason that may pass."""

    problems: list[str] = field(default_factory=list)
    unread: bool = False


def load(paths: Paths) -> Config:
    """Read all configuration files; never raises for what stands in them."""
    chosen: dict[tuple[str, str], Assignment] = {}
    complaints = Complaints()
    problems = complaints.problems
    files = configuration_files(paths, complaints)
    for path in files:
        try:
            text = _text(paths, path)
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


def configuration_files(paths: Paths, complaints: Complaints) -> list[str]:
    """The files to read, in the order in which they apply: the main file, then the drop-ins by name.

    A directory that is not trusted has no say, as one of hooks: it neither overrides nor masks, and it is reported.
    """
    mains: list[str] = []
    drop_ins: dict[str, str] = {}
    with Inspector(paths.root) as inspector:
        for directory in (paths.config_lib, paths.config_run, paths.config_etc):
            if not _has_say(inspector, directory, complaints.problems):
                continue
            if _exists(main := os.path.join(directory, MAIN)):
                mains.append(main)
            folder = os.path.join(directory, MAIN + ".d")
            if not _has_say(inspector, folder, complaints.problems):
                continue
            try:
                names = sorted(patiently(lambda folder=folder: os.listdir(folder)))  # type: ignore[misc]
            except (FileNotFoundError, NotADirectoryError):
                continue
            except OSError as error:
                complaints.problems.append(f"{folder}: cannot be listed: {error.strerror}")
                complaints.unread = complaints.unread or may_pass(error)
                continue
            drop_ins.update({name: os.path.join(folder, name) for name in names if name.endswith(".conf")})
    ordered = [*mains[-1:], *(drop_ins[name] for name in sorted(drop_ins))]
    return [path for path in ordered if not _is_masked(path)]


def _exists(path: str) -> bool:
    """Whether something stands there; where that cannot be known, reading it will tell why."""
    try:
        patiently(lambda: os.lstat(path))
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True
    return True


def _has_say(inspector: Inspector, directory: str, problems: list[str]) -> bool:
    try:
        inspector.check(directory)
    except Untrusted as error:
        problems.append(f"{directory}: is not trusted, nothing in it is obeyed: {error}")
        return False
    except OSError:
        # Absent, or no directory: it then holds nothing either.
        return True
    return True


def _is_masked(path: str) -> bool:
    try:
        status = os.stat(path)
    except OSError:
        return False
    return stat.S_ISCHR(status.st_mode) or (stat.S_ISREG(status.st_mode) and status.st_size == 0)


def _text(paths: Paths, path: str) -> str:
    """What stands in the file; ConfigError where somebody else may have written it, or it cannot be read.

    UnreadableError in its place where that may pass.
    """
    ignored = "its settings are ignored"
    try:
        return patiently(lambda: _read(_trusted(paths, path))).decode()
    except Untrusted as error:
        raise ConfigError(path, f"is not trusted: {error}", hint=error.hint) from error
    except OSError as error:
        kind = UnreadableError if may_pass(error) else ConfigError
        raise kind(path, f"cannot be read: {error.strerror}", hint=ignored) from error
    except UnicodeDecodeError as error:
        raise ConfigError(path, "is not a text file in UTF-8", hint=ignored) from error


def _trusted(paths: Paths, path: str) -> str:
    """The checked path of the file, without links."""
    with Inspector(paths.root) as inspector:
        return inspector.check(path).path


def _read(path: str) -> bytes:
    # O_NONBLOCK: a FIFO in this place must not stop the daemon.
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ConfigError(path, "is not a regular file", hint="its settings are ignored")
        data = read_up_to(descriptor, _MAX_BYTES + 1)
        if len(data) > _MAX_BYTES:
            raise ConfigError(path, f"is larger than {_MAX_BYTES} bytes", hint="its settings are ignored")
        return data
    finally:
        os.close(descriptor)


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
