# SPDX-License-Identifier: Apache-2.0
"""The parser that decides which processes are killed, held to a few real ones: hooks of ours, and a bystander.

Nothing is killed here; what would be is looked at. A file that names a process by its id and start time is believed,
since only root writes it, so the words `BYSTANDER` and `HOOK` in an input stand for the ids of these processes and
`HOOK_START` for one start time: no input can name the bystander rightly.
"""

from __future__ import annotations

import json
import os
import subprocess
from functools import cache
from pathlib import Path

from vmfork.reactor import descendants
from vmfork.reactor.descendants import Process
from vmfork.reactor.ledger import _leftovers, _unfinished

PLACE = "the/file"
HOOK, TOKEN = "10-hook", "ab" * 16


@cache
def _started(**environment: str) -> Process:
    """A process in a session of its own, which ends with this one: its standard input does."""
    child = subprocess.Popen(
        ["cat"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, env=environment, start_new_session=True
    )
    _kept.append(child)
    wanted = b"".join(f"{name}={value}\0".encode() for name, value in environment.items())
    # The kernel closes what ends an exec for its parent before the new program's environment can be read.
    while (
        (process := descendants.read_process(child.pid)) is None
        or process.session != child.pid
        or (Path(f"/proc/{child.pid}/environ").read_bytes() != wanted)
    ):
        pass
    return process


_kept: list[subprocess.Popen[bytes]] = []


def react_hooks(data: bytes) -> None:
    """Whatever it says, only what it names rightly, what carries a hook's environment, and what comes of these dies."""
    bystander, hook = _started(), _started(VMFORK_HOOK=HOOK, VMFORK_FORK_TOKEN=TOKEN)
    for word, number in ((b"BYSTANDER", bystander.pid), (b"HOOK_START", hook.start), (b"HOOK", hook.pid)):
        data = data.replace(word, b"%d" % number)
    chosen = {one.pid: one for one in _leftovers(_unfinished(data, PLACE)[:8], "")}
    assert not chosen.keys() & {os.getpid(), os.getppid(), 0, 1}
    lines = [line for line in map(_object, data.splitlines()) if line is not None]
    named = {(line.get("pid"), line.get("start")) for line in lines}
    marks = {(line.get("hook"), line.get("token")) for line in lines}
    table = descendants.processes()
    assert bystander.pid not in chosen or (bystander.pid, bystander.start) in named
    assert all(_may_be_killed(one, named, marks, table) for one in chosen.values())
    started = {"hook": HOOK, "token": TOKEN}
    if not any(line.get("hook") == HOOK for line in lines):
        with_hook = data + b"\n" + json.dumps(started).encode()
        assert hook.pid in {one.pid for one in _leftovers(_unfinished(with_hook, PLACE)[-1:], "")}


def _object(line: bytes) -> dict[str, object] | None:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _may_be_killed(
    process: Process, named: set[tuple[object, object]], marks: set[tuple[object, object]], table: dict[int, Process]
) -> bool:
    line = [process]
    while (parent := table.get(line[-1].parent)) is not None and parent not in line:
        line.append(parent)
    return any((one.pid, one.start) in named or _carries(one.pid, marks) or _of(one, named, table) for one in line)


def _of(process: Process, named: set[tuple[object, object]], table: dict[int, Process]) -> bool:
    """Of the session of a named process, which itself is gone or rightly named."""
    leader = table.get(process.session)
    return any(
        pid == process.session and (leader is None or leader.start == start) for pid, start in named if pid is not None
    )


def _carries(pid: int, marks: set[tuple[object, object]]) -> bool:
    try:
        environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return False
    own = dict(entry.partition(b"=")[::2] for entry in environment)
    return any(
        own.get(b"VMFORK_HOOK", b"").decode("utf-8", "replace") == hook
        and token in (None, own.get(b"VMFORK_FORK_TOKEN", b"").decode("utf-8", "replace"))
        for hook, token in marks
        if hook is not None
    )
