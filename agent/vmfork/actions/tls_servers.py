# SPDX-License-Identifier: Apache-2.0
"""The known TLS servers: how each is told to draw new session ticket keys, and what would go wrong if it were told now.

A reload with a broken configuration ends some of them, so the configuration is tried before. Ticket keys that come
from a file outlive every reload: those files are the admin's, and are only named.
"""

from __future__ import annotations

import glob
import os
import re
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from vmfork.actions.contract import ActionContext
from vmfork.actions.files import beginning
from vmfork.actions.processes import Process
from vmfork.errors import ActionError

_MAX_ENVIRONMENT = 128 * 1024
_MAX_CONFIGURATION = 1024 * 1024
_CHECK_SEC = 5.0
_APACHE_FILE = re.compile(r"^\s*\([*0-9]+\)\s+(/.*)$", re.MULTILINE)
_KEY_FILES: Mapping[str, re.Pattern[str]] = {
    "nginx": re.compile(r"^\s*ssl_session_ticket_key\s+([^;]+);", re.MULTILINE),
    "apache2": re.compile(r"^\s*SSLSessionTicketKeyFile\s+\"?([^\"\s]+)", re.MULTILINE | re.IGNORECASE),
    "haproxy": re.compile(r"^[^#\n]*\stls-ticket-keys\s+(\S+)", re.MULTILINE),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """A known server: its program, and the signal that means "reload" to its first process.

    `owner` is an account that this process may belong to instead of root, `word` an argument that it must have, where
    the same program is also run for other things. `configuration` gives the configuration as text, "" where it is not
    needed; ActionError where the server would not take it. `holders` are the names of the children that alone keep the
    keys; `execs` tells a server whose first process keeps them, and starts itself anew when it is reloaded.
    """

    program: str
    signal: signal.Signals
    configuration: Callable[[ActionContext, Process], str]
    owner: str | None = None
    word: re.Pattern[str] | None = None
    holders: tuple[str, ...] = ()
    execs: bool = False


def key_files(name: str, text: str) -> tuple[str, ...]:
    """The files that a server's configuration takes ticket keys from."""
    pattern = _KEY_FILES.get(name)
    return tuple(dict.fromkeys(pattern.findall(text))) if pattern else ()


def _nginx(context: ActionContext, first: Process) -> str:
    # nginx writes its command line into the process title, joined by blanks.
    title = " ".join(first.argv)
    found = {option: re.search(rf"\s{option}\s*(\S+)", title) for option in ("-c", "-p")}
    options = [word for option, match in found.items() if match for word in (option, match[1])]
    return context.run.check("nginx", "-T", "-q", *options, timeout=_CHECK_SEC).text


def _haproxy(context: ActionContext, first: Process) -> str:
    # Its master keeps the old workers where the new configuration is broken, so nothing is lost by trying.
    files = [file for path in _values(first, "-f") for file in (path, *sorted(glob.glob(f"{glob.escape(path)}/*.cfg")))]
    return "\n".join(beginning(file, _MAX_CONFIGURATION) for file in files)


def _apache(context: ActionContext, first: Process) -> str:
    options = [word for option in ("-d", "-f", "-D") for value in _values(first, option) for word in (option, value)]
    context.run.check("apache2ctl", "-t", *options, timeout=_CHECK_SEC)
    listed = context.run.run("apache2ctl", "-t", "-D", "DUMP_INCLUDES", *options, timeout=_CHECK_SEC).text
    return "\n".join(beginning(path.strip(), _MAX_CONFIGURATION) for path in _APACHE_FILE.findall(listed))


def _postfix(context: ActionContext, first: Process) -> str:
    words = beginning(os.path.join(context.paths.processes, str(first.pid), "environ"), _MAX_ENVIRONMENT).split("\0")
    told = dict(word.partition("=")[::2] for word in words)
    place = ("-c", told["MAIL_CONFIG"]) if told.get("MAIL_CONFIG") else ()
    # Reads both main.cf and master.cf.
    context.run.check("postconf", *place, "-M", timeout=_CHECK_SEC)
    return ""


def _exim(context: ActionContext, first: Process) -> str:
    options = [word for value in _values(first, "-C") for word in ("-C", value)]
    context.run.check("exim4", *options, "-bV", timeout=_CHECK_SEC)
    return ""


def _dovecot(context: ActionContext, first: Process) -> str:
    options = [word for value in _values(first, "-c") for word in ("-c", value)]
    context.run.check("doveconf", *options, "-n", timeout=_CHECK_SEC)
    return ""


SERVERS: Mapping[str, Server] = {
    "nginx": Server(program="nginx", signal=signal.SIGHUP, configuration=_nginx),
    "haproxy": Server(program="haproxy", signal=signal.SIGUSR2, configuration=_haproxy),
    "apache2": Server(program="apache2", signal=signal.SIGUSR1, configuration=_apache),
    # Each smtpd asks tlsmgr for the keys, and does not outlive the connection that it has at the reload.
    "postfix": Server(
        program="/usr/lib/postfix/sbin/master", signal=signal.SIGHUP, configuration=_postfix, holders=("tlsmgr",)
    ),
    "dovecot": Server(program="dovecot", signal=signal.SIGHUP, configuration=_dovecot),
    # The daemon draws the key for the children that serve; it has given up root, and gets it back by its new start.
    "exim4": Server(
        program="exim4",
        signal=signal.SIGHUP,
        configuration=_exim,
        owner="Debian-exim",
        word=re.compile(r"-bdf?"),
        execs=True,
    ),
}


def no_master(name: str) -> ActionError:
    """The failure of a server that has no process to reload it."""
    return ActionError("runs without a master process, so it cannot be reloaded", hint=f"start {name} with -W")


def _values(first: Process, option: str) -> tuple[str, ...]:
    """The values of an option in a command line, glued to it or not."""
    words = iter(first.argv[1:])
    found = [next(words, "") if word == option else word[len(option) :] for word in words if word.startswith(option)]
    return tuple(value for value in found if value)
