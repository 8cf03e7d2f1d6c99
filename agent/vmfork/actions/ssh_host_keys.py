# SPDX-License-Identifier: Apache-2.0
"""New ssh host keys of the types that this machine has, and proof that sshd presents them.

Every new pair is complete on disk before the first old one is replaced. A key with a certificate is not touched: its
clients trust the authority only and the old certificate does not fit a new key, so they would be locked out. That key
stays shared with other clones, hence the action fails and says so; the other keys are made new nevertheless.
"""

from __future__ import annotations

import contextlib
import glob
import os
import signal
from dataclasses import dataclass

from vmfork import settings
from vmfork.actions import ssh_keys, sshd_config
from vmfork.actions.contract import Action, ActionContext
from vmfork.actions.ssh_keys import HostKey, NewPair
from vmfork.actions.ssh_scan import verify_served
from vmfork.errors import ActionError, ActionSkipped

# sshd's compiled-in list, and what Debian's postinst makes: files that nobody configured are secrets as well.
_CONVENTIONAL = "/etc/ssh/ssh_host_*_key"
_UNITS = ("ssh.service", "sshd.service")
_SOCKETS = ("ssh.socket", "sshd.socket")
_KEYGEN_SEC = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Certificate:
    """A host certificate, and the fingerprint of the key that it is for."""

    path: str
    fingerprint: str


def after_fork(context: ActionContext) -> None:
    config = sshd_config.read(context.paths)
    candidates = _candidates(context, config)
    if not candidates:
        raise ActionSkipped("there are no ssh host keys here")
    context.run.need("ssh-keygen", package="openssh-client")
    problems: list[str] = []
    keys = _existing(context, candidates, problems)
    keys = _without_certified(context, keys, config, problems)
    if context.dry_run:
        _tell_plan(context, keys)
    else:
        pairs = _install_all(context, _prepare_all(context, keys, problems), problems)
        if pairs:
            expected = _reload(context)
            verify_served(context, config, {pair.old.public: pair.public for pair in pairs}, expected=expected)
    if problems:
        raise ActionError("; ".join(problems), hint="the other keys are new")


def _candidates(context: ActionContext, config: sshd_config.SshdConfig) -> tuple[str, ...]:
    """Every private key that exists, by the name that its configuration uses, below the root."""
    named = [context.paths.at(path) for path in config.host_keys]
    found = sorted(glob.glob(context.paths.at(_CONVENTIONAL)))
    return tuple(path for path in dict.fromkeys([*named, *found]) if os.path.lexists(path))


def _existing(context: ActionContext, candidates: tuple[str, ...], problems: list[str]) -> tuple[HostKey, ...]:
    keys: dict[str, HostKey] = {}
    for path in candidates:
        try:
            key = ssh_keys.inspect(context.run, context.paths, path)
        except ActionError as error:
            problems.append(str(error))
            continue
        if key is not None:
            keys[key.path] = key
    return tuple(keys.values())


def _without_certified(
    context: ActionContext, keys: tuple[HostKey, ...], config: sshd_config.SshdConfig, problems: list[str]
) -> tuple[HostKey, ...]:
    certificates = {found.fingerprint: found.path for found in _certificates(context, config, problems)}
    free = []
    for key in keys:
        certificate = certificates.get(key.fingerprint) if key.fingerprint else None
        if certificate is None:
            free.append(key)
        else:
            problems.append(
                f"{key.path} is still the shared key: {certificate} certifies it and would not fit a new one; "
                f"make a new key and certificate by hand"
            )
    return tuple(free)


def _certificates(
    context: ActionContext, config: sshd_config.SshdConfig, problems: list[str]
) -> tuple[_Certificate, ...]:
    found = []
    for name in config.certificates:
        path = context.paths.at(name)
        if not os.path.exists(path):
            context.say(f"{path} is configured as a certificate, but is not there")
            continue
        try:
            with open(path, encoding="ascii") as file:
                text = file.read(64 * 1024)
            _, fingerprint = ssh_keys.listing(context.run, text.strip())
        except (ActionError, OSError, UnicodeDecodeError) as error:
            problems.append(f"{path}: is not a certificate that can be read: {error}")
            continue
        found.append(_Certificate(path=path, fingerprint=fingerprint))
    return tuple(found)


def _prepare_all(context: ActionContext, keys: tuple[HostKey, ...], problems: list[str]) -> tuple[NewPair, ...]:
    pairs = []
    try:
        for key in keys:
            try:
                pairs.append(ssh_keys.prepare(context.run, key, timeout=_KEYGEN_SEC))
            except ActionError as error:
                problems.append(f"{key.path} is still the old key: {error}")
    except BaseException:
        for pair in pairs:
            ssh_keys.discard(pair.private, pair.public_file)
        raise
    return tuple(pairs)


def _install_all(context: ActionContext, pairs: tuple[NewPair, ...], problems: list[str]) -> tuple[NewPair, ...]:
    installed = []
    for pair in pairs:
        try:
            ssh_keys.install(pair)
            ssh_keys.verify(context.run, pair)
        except ActionError as error:
            ssh_keys.discard(pair.private, pair.public_file)
            problems.append(str(error))
            continue
        was = pair.old.fingerprint or "unreadable"
        context.say(f"new {pair.old.algorithm.upper()} host key {pair.fingerprint} in {pair.old.path} (was {was})")
        installed.append(pair)
    return tuple(installed)


def _tell_plan(context: ActionContext, keys: tuple[HostKey, ...]) -> None:
    for key in keys:
        size = f"{key.bits} bits" if key.bits else "the usual size"
        now = key.fingerprint or "unreadable"
        context.would(f"make a new {key.algorithm.upper()} host key of {size} in {key.path} (now {now})")
    unit = _running_unit(context)
    if unit is not None:
        context.would(f"reload {unit}")


def _running_unit(context: ActionContext) -> str | None:
    return next((unit for unit in _UNITS if context.run.is_active(unit)), None)


def _reload(context: ActionContext) -> bool:
    """Make a running sshd read its keys again; one that a socket starts reads them for each connection anyway.

    Whether somebody is known to answer then.
    """
    unit = _running_unit(context)
    if unit is not None:
        context.run.systemctl("reload", unit)
        context.say(f"reloaded {unit}")
    elif any(context.run.is_active(socket) for socket in _SOCKETS):
        context.say("sshd is started by its socket: each connection gets the new keys")
    elif context.run.systemd or context.paths.is_fake or not _hang_up(context):
        return False
    return True


def _hang_up(context: ActionContext) -> bool:
    """SIGHUP for an sshd that no service manager looks after; whether there is one."""
    with contextlib.suppress(OSError, ValueError):
        with open(context.paths.sshd_pid, encoding="ascii") as file:
            pid = int(file.read(32))
        with open(os.path.join(context.paths.processes, str(pid), "comm"), encoding="utf-8") as file:
            if file.read(64).strip() != "sshd":
                return False
        os.kill(pid, signal.SIGHUP)
        context.say(f"told sshd (process {pid}) to read its configuration again")
        return True
    return False


ACTION = Action(
    name="ssh-host-keys",
    hook="25-ssh-host-keys",
    summary="Give this machine new ssh host keys of the types that it has.",
    identity=True,
    keys=(settings.SSH_VERIFY,),
    after_fork=after_fork,
)
