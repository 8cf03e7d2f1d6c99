# SPDX-License-Identifier: Apache-2.0
"""A new host name, from a template with the fork token in it or from a command of the admin's.

Sets the kernel's name and /etc/hostname, and follows in the loopback lines of /etc/hosts. Nothing else is rewritten;
files that also hold the old name are named.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterator

from vmfork import settings
from vmfork.actions import files, spread
from vmfork.actions.contract import Action, ActionContext
from vmfork.errors import ActionError, ActionSkipped

_LABEL = re.compile(r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?")
_TOKEN = re.compile(r"%(\d{0,2})t")
# include/uapi/linux/utsname.h: __NEW_UTS_LEN.
_MAX_NAME = 64


def after_fork(context: ActionContext) -> None:
    path = files.resolve(context.paths, context.paths.hostname)
    old = files.read_text(path).strip()
    command, template = context.get(settings.HOSTNAME_COMMAND), context.get(settings.HOSTNAME_TEMPLATE)
    if command:
        if context.would(f"set the host name to what {command[0]} prints (now {old or 'none'})"):
            return
        # It may well ask a server that all clones share.
        spread.wait(context)
        new = _printed_by(context, command)
    elif template:
        new = check_name(expand(template, context.token))
    else:
        raise ActionSkipped("neither Template= nor Command= is configured for this hook")
    if context.would(f"set the host name to {new} (now {old or 'none'}) in the kernel, {path} and the hosts file"):
        return
    files.replace_file(path, f"{new}\n".encode(), mode=0o644)
    if not context.paths.is_fake:
        _set_kernel_name(new)
    _follow_in_hosts(context, old, new)
    if files.read_text(path).strip() != new:
        raise ActionError(f"{path}: holds something else than was written")
    context.say(f"set the host name to {new} (was {old or 'none'})")
    for place in _places_with(context, old):
        context.say(f"still holds the old name: {place}")
    if context.run.is_active("systemd-hostnamed.service"):
        context.run.systemctl("try-restart", "systemd-hostnamed.service", no_block=True)


def expand(template: str, token: bytes) -> str:
    """A template with %t (the token in hex) and %8t (its first 8 digits) replaced."""
    digits = token.hex()
    return _TOKEN.sub(lambda found: digits[: int(found[1] or len(digits))], template)


def check_name(name: str) -> str:
    """The name itself; ActionError unless it is one that Linux and DNS take."""
    if not 0 < len(name) <= _MAX_NAME or not all(_LABEL.fullmatch(label) for label in name.split(".")):
        raise ActionError(
            f"{name!r} is no host name", hint="letters, digits and hyphens in each label, 64 characters in all"
        )
    return name


def _printed_by(context: ActionContext, command: tuple[str, ...]) -> str:
    words = context.run.check(*command, environment=context.hook_environment()).text.split()
    if len(words) != 1:
        raise ActionError(f"{command[0]}: must print one host name, and printed {len(words)} words")
    return check_name(words[0])


def _set_kernel_name(new: str) -> None:
    try:
        socket.sethostname(new)
    except OSError as error:
        raise ActionError(f"the kernel's host name cannot be set: {error.strerror}", hint="run as root") from error
    if os.uname().nodename != new:
        raise ActionError("the kernel's host name was set, and yet it is another one")


def _follow_in_hosts(context: ActionContext, old: str, new: str) -> None:
    path = files.resolve(context.paths, context.paths.hosts)
    text = files.read_text(path)
    changed = renamed_hosts(text, old, new)
    if old and changed != text:
        files.replace_file(path, changed.encode("utf-8", "surrogateescape"), mode=0o644)
        context.say(f"renamed {old} in {path}")


def renamed_hosts(text: str, old: str, new: str) -> str:
    """An /etc/hosts in which this machine's own lines, those of loopback addresses, have the new name."""
    return "".join(_renamed_line(line, old, new) for line in text.splitlines(keepends=True))


def _renamed_line(line: str, old: str, new: str) -> str:
    body, hash_sign, comment = line.partition("#")
    words = body.split()
    if len(words) < 2 or not (words[0].startswith("127.") or words[0] == "::1") or old in ("", "localhost"):
        return line
    short_old, short_new = old.partition(".")[0], new.partition(".")[0]

    def renamed(found: re.Match[str]) -> str:
        word = found[0]
        if word == old:
            return new
        if word == short_old:
            return short_new
        # The qualified name of the same machine: old.example.org.
        return short_new + word[len(short_old) :] if word.startswith(short_old + ".") else word

    address = body.index(words[0]) + len(words[0])
    return body[:address] + re.sub(r"\S+", renamed, body[address:]) + hash_sign + comment


def _places_with(context: ActionContext, old: str) -> Iterator[str]:
    if old and old in files.read_text(context.paths.mailname).split():
        yield context.paths.mailname


ACTION = Action(
    name="hostname",
    hook="30-hostname",
    summary="Give this machine a new host name, from a template or a command.",
    identity=True,
    keys=(settings.HOSTNAME_TEMPLATE, settings.HOSTNAME_COMMAND),
    after_fork=after_fork,
)
