# SPDX-License-Identifier: Apache-2.0
"""vmfork.conf and its drop-ins, in the order of UAPI.6: /usr/lib, /run, /etc; which of them hold, and their text.

A file is obeyed only if nobody but root can have written it: it names commands to run. One that the kernel does not
show at the moment is told from one that is not there or is broken.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass, field

from vmfork.atomicfile import may_pass, patiently, read_up_to
from vmfork.errors import ConfigError, UnreadableError
from vmfork.paths import Paths
from vmfork.trust import Inspector, Untrusted

_MAIN = "vmfork.conf"
_MAX_BYTES = 1 << 20


@dataclass(slots=True, kw_only=True)
class Complaints:
    """What is wrong so far; `unread` once something could not be read for a reason that may pass."""

    problems: list[str] = field(default_factory=list)
    unread: bool = False


def in_order(paths: Paths, complaints: Complaints) -> list[str]:
    """The files to read, in the order in which they apply: the main file, then the drop-ins by name.

    A directory that is not trusted has no say, as one of hooks: it neither overrides nor masks, and it is reported.
    """
    mains: list[str] = []
    drop_ins: dict[str, str] = {}
    with Inspector(paths.root) as inspector:
        for directory in (paths.config_lib, paths.config_run, paths.config_etc):
            if not _has_say(inspector, directory, complaints.problems):
                continue
            if _exists(main := os.path.join(directory, _MAIN)):
                mains.append(main)
            folder = os.path.join(directory, _MAIN + ".d")
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


def text_of(paths: Paths, path: str) -> str:
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
