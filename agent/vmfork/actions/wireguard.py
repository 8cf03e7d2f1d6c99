# SPDX-License-Identifier: Apache-2.0
"""A new private key for the configured WireGuard interfaces; the public key goes to the admin's command.

The private key is drawn here, passes through netlink or a pipe, and is never an argument, in an environment or in a
message. The kernel itself ends the sessions of the old key. Where the interface has a configuration file of wg-quick or
systemd-networkd, the new key is written there, so that it lasts.
"""

from __future__ import annotations

import base64
import fnmatch
import glob
import os
import re

from vmfork import settings
from vmfork.actions import files, netlink, spread
from vmfork.actions.commands import operand
from vmfork.actions.contract import Action, ActionContext
from vmfork.actions.netlink import Link
from vmfork.errors import ActionError, ActionSkipped

_KEY_LINE = re.compile(r"^([ \t]*PrivateKey[ \t]*=[ \t]*)[^\s#;]*", re.MULTILINE | re.IGNORECASE)
_KEY_FILE_LINE = re.compile(r"^[ \t]*PrivateKeyFile[ \t]*=[ \t]*(/\S+)", re.MULTILINE)
_NAME_LINE = re.compile(r"^[ \t]*Name[ \t]*=[ \t]*(\S+)", re.MULTILINE)


def after_fork(context: ActionContext) -> None:
    patterns = context.get(settings.WIREGUARD_INTERFACES)
    if not patterns:
        raise ActionSkipped("no interfaces are configured for this hook (Interfaces=)")
    if context.paths.is_fake:
        raise ActionSkipped("the network belongs to the machine around this root")
    if context.early:
        raise ActionSkipped("the interfaces come up after this")
    with netlink.socket() as route:
        links = netlink.links(route)
    chosen = [link for link in links if any(fnmatch.fnmatchcase(link.name, pattern) for pattern in patterns)]
    if not chosen:
        raise ActionSkipped(f"no interface is named {' or '.join(patterns)}")
    if context.get(settings.WIREGUARD_PUBLISH):
        # The registry of keys is one for all clones; until then the old key is in service, as the registry knows it.
        spread.wait(context)
    problems = []
    for link in chosen:
        try:
            _renew(context, link)
        except ActionError as error:
            problems.append(f"{link.name}: {error}")
    if problems:
        raise ActionError("; ".join(problems))


def new_key() -> str:
    """A private key for X25519 in base64, clamped as `wg genkey` does."""
    raw = bytearray(os.urandom(32))
    raw[0] &= 248
    raw[31] = raw[31] & 127 | 64
    return base64.b64encode(raw).decode()


def key_files(context: ActionContext, name: str) -> tuple[str, ...]:
    """The files that give this interface its private key at the next start."""
    found = []
    quick = os.path.join(context.paths.wireguard_etc, f"{name}.conf")
    if _KEY_LINE.search(files.read_text(quick)):
        found.append(quick)
    for path in sorted(glob.glob(os.path.join(glob.escape(context.paths.networkd_etc), "*.netdev"))):
        text = files.read_text(path)
        if name in _NAME_LINE.findall(text):
            found += [path] if _KEY_LINE.search(text) else []
            found += [context.paths.at(file) for file in _KEY_FILE_LINE.findall(text)]
    return tuple(dict.fromkeys(found))


def with_key(text: str, key: str) -> str:
    """A configuration with another private key; a file without such a line is a key file and holds nothing else."""
    changed, count = _KEY_LINE.subn(lambda line: line[1] + key, text, count=1)
    return changed if count else f"{key}\n"


def _renew(context: ActionContext, link: Link) -> None:
    places = key_files(context, link.name) if context.get(settings.WIREGUARD_PERSIST) else ()
    command = context.get(settings.WIREGUARD_PUBLISH)
    deeds = [f"give {link.name} a new private key", *(f"write it to {path}" for path in places)]
    if context.would(", ".join(deeds + ([f"tell {command[0]} the public key"] if command else []))):
        return
    if command and context.run.find(command[0]) is None:
        raise ActionError(f"PublishCommand= names {command[0]}, which cannot be run: the key is left as it is")
    if command or not _is_kernels(link):
        operand(link.name)
    old, key = _public_key(context, link), new_key()
    # The files first: a kill in between leaves the old key in service, and a repeat replaces both.
    for path in places:
        target = files.resolve(context.paths, path)
        files.replace_file(
            target, with_key(files.read_text(target), key).encode("utf-8", "surrogateescape"), mode=0o600
        )
    if _is_kernels(link):
        netlink.set_wireguard_key(link.name, key)
    else:
        context.run.check("wg", "set", link.name, "private-key", "/dev/stdin", stdin=f"{key}\n".encode())
    new = _public_key(context, link)
    if not new or new == old:
        raise ActionError("the interface still has its old key")
    context.say(f"{link.name}: the public key is now {new} (was {old or 'none'})")
    context.say(
        f"{link.name}: written to {', '.join(places)}" if places else f"{link.name}: lasts until it is set up again"
    )
    if command:
        environment = context.hook_environment()
        context.run.check(*command, link.name, old, new, environment=environment, stdin=f"{new}\n".encode())
        context.say(f"{link.name}: {command[0]} was told")
    else:
        context.say(f"{link.name}: no peer knows the new key yet (PublishCommand= is not set)")


def _is_kernels(link: Link) -> bool:
    """Whether the kernel runs it; otherwise it is a program in user space that wg(8) can talk to."""
    return link.kind == "wireguard"


def _public_key(context: ActionContext, link: Link) -> str:
    if _is_kernels(link):
        return netlink.wireguard_public_key(link.name)
    context.run.need("wg", package="wireguard-tools")
    key = context.run.check("wg", "show", link.name, "public-key").text.strip()
    return "" if key == "(none)" else key


ACTION = Action(
    name="wireguard",
    hook="55-wireguard",
    summary="Give the configured WireGuard interfaces new private keys.",
    identity=True,
    keys=(settings.WIREGUARD_INTERFACES, settings.WIREGUARD_PUBLISH, settings.WIREGUARD_PERSIST),
    after_fork=after_fork,
)
