# SPDX-License-Identifier: Apache-2.0
"""Reloads the running TLS servers, so that the keys of their session tickets are new.

Those keys are random, live in the server's memory, and clones share them: who holds one clone's can read another's
resumed sessions. A reload draws new ones; it is done when no process with the old ones takes connections any more.
nginx keeps sessions in a shared cache over a reload, so there it is restarted. Keys from a file are named.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable

from vmfork import settings
from vmfork.actions import processes
from vmfork.actions.contract import Action, ActionContext
from vmfork.actions.processes import Process
from vmfork.actions.tls_servers import SERVERS, Server, key_files, no_master
from vmfork.errors import ActionError, ActionSkipped

_PATIENCE_SEC = 6.0
_MAX_CGROUP = 4096
# The title of an nginx worker that takes connections, over UDP too; one that ends after a reload has another.
_NGINX_ACCEPTS = "nginx: worker process"
_NGINX_CACHE = re.compile(r"^\s*ssl_session_cache\s[^;]*shared:", re.MULTILINE)


def after_fork(context: ActionContext) -> None:
    if context.paths.is_fake:
        raise ActionSkipped("the servers belong to the machine around this root")
    if context.early:
        raise ActionSkipped("the servers start after this, with keys of their own")
    wanted = context.get(settings.SESSION_KEYS_SERVERS)
    problems: list[str] = []
    running = [(name, process) for name in wanted if name in SERVERS for process in firsts(context, SERVERS[name])]
    for name, process in running:
        _guarded(context, name, problems, lambda name=name, process=process: _renew(context, name, process))  # type: ignore[misc]
    if problems:
        raise ActionError("; ".join(problems))
    if not running:
        raise ActionSkipped(f"none of these runs: {', '.join(wanted)}")


def firsts(context: ActionContext, server: Server) -> tuple[Process, ...]:
    """The first process of each running instance of a server."""
    program = context.run.find(server.program)
    if program is None:
        return ()
    found = processes.daemons(context.paths, program, owner=server.owner)
    own = {process.pid for process in found}
    return tuple(
        process
        for process in found
        if process.parent not in own and (server.word is None or any(map(server.word.fullmatch, process.argv[1:])))
    )


def unit_of(context: ActionContext, process: Process) -> str | None:
    """The systemd service that a process belongs to."""
    if not context.run.systemd:
        return None
    try:
        with open(os.path.join(context.paths.processes, str(process.pid), "cgroup"), encoding="utf-8") as file:
            last = file.read(_MAX_CGROUP).strip().splitlines()[-1].rpartition("/")[2]
    except (OSError, IndexError):
        return None
    return last if last.endswith(".service") else None


def _guarded(context: ActionContext, name: str, problems: list[str], deed: Callable[[], None]) -> None:
    """One server that cannot be reloaded does not keep the others from it."""
    try:
        deed()
    except ActionError as error:
        problems.append(f"{name}: {error}" + (f" ({error.hint})" if error.hint else ""))
        context.say(f"{name}: failed")


def _renew(context: ActionContext, name: str, first: Process) -> None:
    server, unit = SERVERS[name], unit_of(context, first)
    where = f"{name} ({unit or f'process {first.pid}'})"
    text = server.configuration(context, first)
    for path in key_files(name, text):
        context.say(f"{name} takes ticket keys from {path}: that file is yours to renew")
    restart = name == "nginx" and _NGINX_CACHE.search(text) is not None
    if context.would(f"{'restart' if restart else 'reload'} {where}, for new session ticket keys"):
        return
    before = processes.children(context.paths, first.pid)
    if restart:
        _restart(context, first, unit)
        context.say(f"restarted {where}: its shared session cache would outlive a reload")
        return
    if unit is not None and _can_reload(context, unit):
        context.run.systemctl("reload", unit, timeout=_PATIENCE_SEC)
    elif name == "haproxy" and not before:
        raise no_master(name)
    elif not processes.tell(first, context.paths, server.signal):
        raise ActionError("ended before it could be reloaded")
    end = context.run.remaining(_PATIENCE_SEC)
    if not processes.wait_until(lambda: _is_renewed(context, server, first, before), timeout=end):
        raise ActionError("was told to reload, and yet a process with the old keys takes connections")
    if processes.look(context.paths, first.pid) is None:
        raise ActionError("ended when it was told to reload")
    context.say(f"reloaded {where}; verified: no process with the old keys takes connections")


def _is_renewed(context: ActionContext, server: Server, first: Process, before: tuple[Process, ...]) -> bool:
    if server.execs:
        now = processes.look(context.paths, first.pid)
        return now is None or (now.image != first.image and processes.listens(context.paths, now.pid))
    old = {process.image for process in before}
    current = processes.children(context.paths, first.pid)
    left = [process for process in current if process.image in old]
    if server.holders:
        return not any(_name(process) in server.holders for process in left)
    if any(process.argv[:1] == (_NGINX_ACCEPTS,) for process in left):
        return False
    return len(left) < len(current) and not any(processes.listens(context.paths, process.pid) for process in left)


def _name(process: Process) -> str:
    return os.path.basename(process.argv[0].split()[0]) if process.argv and process.argv[0].split() else ""


def _restart(context: ActionContext, first: Process, unit: str | None) -> None:
    if unit is None:
        raise ActionError("keeps sessions in a shared cache over a reload", hint="restart nginx after each fork")
    context.run.systemctl("try-restart", unit)
    now = processes.look(context.paths, first.pid)
    if now is not None and now.image == first.image:
        raise ActionError("was restarted, and yet the old process goes on")


def _can_reload(context: ActionContext, unit: str) -> bool:
    shown = context.run.run("systemctl", "show", "--property=CanReload", "--value", "--", unit, timeout=5)
    return shown.text.strip() == "yes"


ACTION = Action(
    name="session-keys",
    hook="60-session-keys",
    summary="Reload the running TLS servers, so that their session ticket keys are new.",
    keys=(settings.SESSION_KEYS_SERVERS,),
    after_fork=after_fork,
)
