# SPDX-License-Identifier: Apache-2.0
"""Finds the hooks of this guest and says of each entry of the two directories whether it runs, and if not, why.

A file in /etc overrides one of the same name in /usr/lib; an empty file or a link to /dev/null masks. Names are
hostile input: only `NN-word[.ext]` in plain ASCII is ever run or reported to others; any other name is only listed,
with what a terminal could misread escaped. Nothing is run here.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from enum import StrEnum

from vmfork.annotations import Protocol
from vmfork.errors import InputError
from vmfork.jsonfields import JsonObject
from vmfork.model import HookOutcome
from vmfork.paths import Paths
from vmfork.reactor.refusals import passes
from vmfork.trust import Inspector, Untrusted

_NAME = re.compile(r"([0-9]{2})-[A-Za-z0-9][A-Za-z0-9_-]*(?:\.[A-Za-z0-9]+)?")
_LEFTOVER = re.compile(
    r".*~|\..*|#.*#|README.*|.*\.(?:bak|orig|old|sample|swp|swo|tmp|dpkg-.*|rpm.*|ucf-.*)|.*,v", re.DOTALL
)
_MAX_ENTRIES = 4096
# What makes a directory an empty one; whatever else keeps it from being read must not look like that.
_ABSENT = (FileNotFoundError, NotADirectoryError)


class Origin(StrEnum):
    """Which directory a hook stands in: the admin's or the package's."""

    ETC = "etc"
    LIB = "lib"


@dataclass(frozen=True, slots=True, kw_only=True)
class Hook:
    """One entry of a hooks directory.

    `order` is its NN, None where the name is no hook's. `program` is the checked path that is run. `state` is None for
    a hook that runs, else the result that it gets in every reaction; an entry without an `order` gets none.
    """

    name: str
    path: str
    order: int | None
    origin: Origin
    reason: str | None = None
    state: HookOutcome | None = None
    hint: str | None = None
    program: str = ""

    @property
    def enabled(self) -> bool:
        return self.order is not None and self.state is None

    def to_json(self) -> JsonObject:
        return {
            "name": self.name,
            "path": self.path,
            "order": self.order,
            "origin": self.origin.value,
            "enabled": self.enabled,
            "reason": self.reason,
        }


class _Enabling(Protocol):
    @property
    def enable(self) -> str: ...


def discover(paths: Paths, settings_of: Callable[[str], _Enabling]) -> tuple[Hook, ...]:
    """Every entry of both directories, in the order in which hooks run; entries that are no hooks stand at the end.

    `settings_of(name)` is what the configuration says of one hook. An /etc directory that is not trusted has no say:
    its entries are listed as untrusted, and neither override nor mask the package's. Raises InputError where a
    directory is there and cannot be read, or a hook cannot be examined for now: what runs is not known then.
    """
    found: dict[str, Hook] = {}
    without_say: list[Hook] = []
    with Inspector(paths.root) as inspector:
        for origin, directory in ((Origin.LIB, paths.hooks_lib), (Origin.ETC, paths.hooks_etc)):
            distrust = _distrust(inspector, directory)
            for hook in _entries(origin, directory):
                if distrust is not None:
                    without_say.append(_distrusted(hook, distrust))
                    continue
                judged = hook if hook.order is None else _judged(inspector, paths, hook)
                overridden = found.get(hook.name)
                if overridden is not None and judged.enabled:
                    judged = replace(judged, reason=f"overrides {overridden.path}")
                found[hook.name] = judged
    hooks = [*without_say, *(_switched(hook, settings_of) for hook in found.values())]
    return tuple(sorted(hooks, key=lambda hook: (hook.order is None, hook.order or 0, hook.name)))


def runnable(hooks: tuple[Hook, ...]) -> tuple[Hook, ...]:
    """The hooks that have a place in a reaction, one of each name: what runs, and what is reported as not run."""
    chosen: dict[str, Hook] = {}
    for hook in hooks:
        if hook.order is not None and not (hook.name in chosen and chosen[hook.name].enabled):
            chosen[hook.name] = hook
    return tuple(chosen.values())


def _distrust(inspector: Inspector, directory: str) -> Untrusted | None:
    try:
        inspector.check(directory)
    except Untrusted as error:
        return error
    except _ABSENT:
        # It then has no entries either.
        return None
    except OSError as error:
        raise _unreadable(directory, error) from error
    return None


def _entries(origin: Origin, directory: str) -> Iterator[Hook]:
    """What stands in a directory; `order` is set where the name is a hook's."""
    try:
        names = sorted(os.listdir(directory))[:_MAX_ENTRIES]
    except _ABSENT:
        return
    except OSError as error:
        raise _unreadable(directory, error) from error
    for name in names:
        hook = Hook(name=_shown(name), path=_shown(os.path.join(directory, name)), order=None, origin=origin)
        match = _NAME.fullmatch(name)
        if _LEFTOVER.fullmatch(name):
            yield replace(hook, state=HookOutcome.SKIPPED, reason="is a leftover of an editor or a package manager")
        elif match is None:
            yield replace(hook, state=HookOutcome.SKIPPED, reason="its name is not of the form NN-word or NN-word.ext")
        else:
            yield replace(hook, order=int(match[1]))


def _unreadable(path: str, error: OSError) -> InputError:
    hint = "run as root" if isinstance(error, PermissionError) else "no hook runs before it can be read"
    return InputError(path, f"cannot be read: {error.strerror}", hint=hint)


def _distrusted(hook: Hook, error: Untrusted) -> Hook:
    if hook.order is None:
        return hook
    reason = f"its directory is not trusted: {error}; {error.hint}"
    return replace(hook, state=HookOutcome.UNTRUSTED, reason=reason, hint=error.hint)


def _judged(inspector: Inspector, paths: Paths, hook: Hook) -> Hook:
    try:
        masked = _mask(hook.path, paths)
        if masked is not None:
            return replace(hook, state=HookOutcome.MASKED, reason=masked)
        checked = inspector.check_program(hook.path)
    except Untrusted as error:
        return replace(hook, state=HookOutcome.UNTRUSTED, reason=f"{error}; {error.hint}", hint=error.hint)
    except OSError as error:
        if passes(error):
            raise _unreadable(hook.path, error) from error
        # One broken file must not keep the others from running.
        return replace(hook, state=HookOutcome.FAILED, reason=f"cannot be examined: {error.strerror}")
    if not checked.status.st_mode & 0o111:
        hint = f"chmod +x {hook.path}"
        return replace(hook, state=HookOutcome.SKIPPED, reason=f"is not executable; {hint}", hint=hint)
    return replace(hook, program=checked.path)


def _mask(path: str, paths: Paths) -> str | None:
    """How this entry masks a hook, or None; OSError where that cannot be told."""
    status = os.lstat(path)
    if stat.S_ISREG(status.st_mode):
        return "is masked by an empty file" if status.st_size == 0 else None
    if not stat.S_ISLNK(status.st_mode):
        return None
    folder = os.path.dirname(path).removeprefix(paths.root)
    # By its text, not by what is found there: a fake guest need not have a /dev/null.
    target = os.path.normpath(os.path.join(folder, os.readlink(path)))
    return "is masked by a link to /dev/null" if target == "/dev/null" else None


def _switched(hook: Hook, settings_of: Callable[[str], _Enabling]) -> Hook:
    if hook.enabled and settings_of(hook.name).enable == "no":
        return replace(hook, state=HookOutcome.MASKED, reason="is switched off by Enable=no in the configuration")
    return hook


def _shown(name: str) -> str:
    """A file name as text that is safe to print and to put into JSON."""
    text = os.fsencode(name).decode("utf-8", "backslashreplace")
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
