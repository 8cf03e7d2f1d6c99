# SPDX-License-Identifier: Apache-2.0
"""The directories that vmfork keeps its files in: nobody else may put a file there.

They are made by tmpfiles.d and belong to root. A mistaken chmod or chown, or an image that was put together by another
user, leaves them open; what lies in there may then be somebody else's, and names commands, states and IDs.
"""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Iterator

from vmfork.paths import Paths
from vmfork.trust import Untrusted

log = logging.getLogger(__name__)


def kept(paths: Paths) -> tuple[tuple[str, int], ...]:
    """What the daemon keeps its files in, with the widest mode of each."""
    return (paths.run_public, 0o755), (paths.run_private, 0o700), (paths.state_dir, 0o700)


def take_all(paths: Paths) -> dict[str, str]:
    """Take what is not ours alone; what was done, by a name for each, stays a problem until the daemon's next start.

    Raises as `take` does.
    """
    problems = {}
    for directory, mode in kept(paths):
        for place, done in take(directory, mode):
            log.error("%s", done)
            problems[f"{place}.broken"] = done
    return problems


def take(path: str, mode: int) -> Iterator[tuple[str, str]]:
    """Make the directory at `path` ours, and no wider open than `mode`; what was done, as (path, sentence).

    Files that others have put there in the meantime are kept under another name. Nothing is done where there is no
    directory. Raises Untrusted where it belongs to somebody else and cannot be had, OSError where a file stays.
    """
    try:
        status = os.stat(path)
    except OSError:
        return
    if not stat.S_ISDIR(status.st_mode):
        return
    ours = (0, os.geteuid())
    is_ours, open_to = status.st_uid in ours, stat.S_IMODE(status.st_mode)
    if not is_ours:
        _own(path, status)
        yield path, f"{path} belonged to uid {status.st_uid}; it was taken back"
    if open_to & 0o777 & ~mode:
        os.chmod(path, open_to & mode)
        yield path, f"{path} had mode {open_to:04o}; it was made {open_to & mode:04o}"
    if not is_ours or open_to & (stat.S_IWGRP | stat.S_IWOTH):
        yield from _set_aside(path, ours)


def _own(path: str, status: os.stat_result) -> None:
    try:
        os.chown(path, os.geteuid(), -1)
    except OSError as error:
        # The unit's sandbox has no CAP_CHOWN; the service manager starts the daemon again, so the cure is enough.
        raise Untrusted(
            f"{path} belongs to uid {status.st_uid}: whatever is published there could be replaced",
            hint=f"systemd-tmpfiles --create vmfork.conf, or: chown root {path}",
        ) from error


def _set_aside(directory: str, ours: tuple[int, ...]) -> Iterator[tuple[str, str]]:
    for name in sorted(os.listdir(directory)):
        path = os.path.join(directory, name)
        owner = os.lstat(path).st_uid
        if owner not in ours:
            os.rename(path, f"{path}.broken")
            yield path, f"{path} belongs to uid {owner}; kept as {path}.broken"
