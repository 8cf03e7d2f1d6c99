# SPDX-License-Identifier: Apache-2.0
"""Reloads the running TLS servers, so that the keys of their session tickets are new.

Those keys are random, live in the server's memory, and clones share them: who holds one clone's can read another's
resumed sessions. A reload draws new ones; that it happened is seen in the server's processes. nginx keeps sessions in a
shared cache over a reload, so there it is restarted. Keys that come from a file are the admin's, and are named.
"""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from vmfork import settings
from vmfork.actions import processes
from vmfork.actions.contract import Action, ActionContext
from vmfork.actions.processes import Process
from vmfork.errors import ActionError, ActionSkipped

_PATIENCE_SEC = 6.0
_MAX_CGROUP = 4096
# The title of an nginx worker that takes connections; one that ends after a reload has another.
_NGINX_ACCEPTS = "nginx: worker process"


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """A known TLS server: its program, the signal that means "reload" to its first process, a check of its
    configuration to pass before, and the names of the children that hold keys (none: any new child is the proof)."""

    program: str
    signal: signal.Signals
    check: tuple[str, ...] = ()
    holders: tuple[str, ...] = ()


SERVERS: Mapping[str, Server] = {
    "nginx": Server(program="nginx", signal=signal.SIGHUP),
    "haproxy": Server(program="haproxy", signal=signal.SIGUSR2),
    # On SIGUSR1 with a broken configuration apache ends, so that is tried before.
    "apache2": Server(program="apache2", signal=signal.SIGUSR1, check=("apache2ctl", "configtest")),
    "postfix": Server(program="/usr/lib/postfix/sbin/master", signal=signal.SIGHUP, holders=("tlsmgr",)),
    "dovecot": Server(
        program="dovecot",
        signal=signal.SIGHUP,
        holders=("imap-login", "pop3-login", "submission-login", "managesieve-login"),
    ),
}
# It gives up root, so its processes prove nothing; only its unit is trusted.
_EXIM, _EXIM_UNIT = "exim4", "exim4.service"


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
    exim = _EXIM in wanted and context.run.find(_EXIM) is not None and context.run.is_active(_EXIM_UNIT)
    if exim:
        _guarded(context, _EXIM, problems, lambda: _reload_unit(context, _EXIM, _EXIM_UNIT))
    if problems:
        raise ActionError("; ".join(problems))
    if not running and not exim:
        raise ActionSkipped(f"none of these runs: {', '.join(wanted)}")


def firsts(context: ActionContext, server: Server) -> tuple[Process, ...]:
    """The first process of each running instance of a server."""
    program = context.run.find(server.program)
    if program is None:
        return ()
    found = processes.daemons(context.paths, program)
    own = {process.pid for process in found}
    return tuple(process for process in found if process.parent not in own)


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
    unit = unit_of(context, first)
    restart = name == "nginx" and _nginx_keeps_sessions(context, first)
    where = f"{name} ({unit or f'process {first.pid}'})"
    if context.would(f"{'restart' if restart else 'reload'} {where}, for new session ticket keys"):
        return
    server = SERVERS[name]
    before = processes.children(context.paths, first.pid)
    if restart:
        _restart(context, first, unit)
    elif unit is not None and _can_reload(context, unit):
        context.run.systemctl("reload", "--", unit, timeout=_PATIENCE_SEC)
    else:
        _signal(context, name, server, first)
    end = context.run.remaining(_PATIENCE_SEC)
    if restart:
        context.say(f"restarted {where}: its shared session cache would outlive a reload")
    elif not processes.wait_until(lambda: _is_renewed(context, server, first, before), timeout=end):
        raise ActionError("was told to reload, and yet the processes with the old keys go on")
    else:
        context.say(f"reloaded {where}; verified: its processes are new")


def _is_renewed(context: ActionContext, server: Server, first: Process, before: tuple[Process, ...]) -> bool:
    old = {process.image for process in before}
    now = processes.children(context.paths, first.pid)
    if any(process.image in old and process.argv[:1] == (_NGINX_ACCEPTS,) for process in now):
        return False
    if server.holders:
        return not any(
            process.image in old and process.argv and os.path.basename(process.argv[0].split()[0]) in server.holders
            for process in now
        )
    return any(process.image not in old for process in now)


def _signal(context: ActionContext, name: str, server: Server, first: Process) -> None:
    if name == "haproxy" and not processes.children(context.paths, first.pid):
        raise ActionError("runs without a master process, so it cannot be reloaded", hint="start haproxy with -W")
    if server.check:
        context.run.check(*server.check)
    if not processes.tell(first, context.paths, server.signal):
        raise ActionError("ended before it could be reloaded")


def _restart(context: ActionContext, first: Process, unit: str | None) -> None:
    if unit is None:
        raise ActionError("keeps sessions in a shared cache over a reload", hint="restart nginx after each fork")
    context.run.systemctl("try-restart", "--", unit)
    now = processes.look(context.paths, first.pid)
    if now is not None and now.image == first.image:
        raise ActionError("was restarted, and yet the old process goes on")


def _nginx_keeps_sessions(context: ActionContext, first: Process) -> bool:
    """Whether sessions outlive a reload; ActionError where nginx would refuse its configuration."""
    title = " ".join(first.argv)
    options = [word for option in ("-c", "-p") for word in _option(title, option)]
    text = context.run.check("nginx", "-T", "-q", *options, timeout=5).text
    for path in re.findall(r"^\s*ssl_session_ticket_key\s+([^;]+);", text, re.MULTILINE):
        context.say(f"nginx takes ticket keys from {path}: that file is yours to renew")
    return re.search(r"^\s*ssl_session_cache\s[^;]*shared:", text, re.MULTILINE) is not None


def _option(title: str, option: str) -> tuple[str, ...]:
    # nginx writes its command line into the process title, joined by blanks.
    found = re.search(rf"\s{option}\s*(\S+)", title)
    return (option, found[1]) if found else ()


def _can_reload(context: ActionContext, unit: str) -> bool:
    shown = context.run.run("systemctl", "show", "--property=CanReload", "--value", "--", unit, timeout=5)
    return shown.text.strip() == "yes"


def _reload_unit(context: ActionContext, name: str, unit: str) -> None:
    if context.would(f"reload {name} ({unit}), for new session keys"):
        return
    context.run.systemctl("reload", "--", unit, timeout=_PATIENCE_SEC)
    if not context.run.is_active(unit):
        raise ActionError(f"{unit} is no longer active after its reload")
    context.say(f"reloaded {name} ({unit})")


ACTION = Action(
    name="session-keys",
    hook="60-session-keys",
    summary="Reload the running TLS servers, so that their session ticket keys are new.",
    keys=(settings.SESSION_KEYS_SERVERS,),
    after_fork=after_fork,
)
