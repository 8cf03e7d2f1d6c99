# SPDX-License-Identifier: Apache-2.0
"""The package's own repairs: which there are, and how a shipped hook or a person runs one.

`main` builds the context from the hook contract (environment, argv, the event on stdin), runs one action and maps its
end to an exit code: 0 done, 77 skipped, 75 try again, 1 failed, 2 wrong usage. Modules are imported when asked for.
"""

from __future__ import annotations

import importlib
import os
import stat
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from vmfork import config
from vmfork.actions.commands import Commands
from vmfork.actions.contract import Action, ActionContext, Phase, TryAgain
from vmfork.errors import ActionError, ActionSkipped, VmforkError
from vmfork.jsonfields import parse_object
from vmfork.model import ForkEvent, IdentityPolicy, Kind
from vmfork.paths import Paths

__all__ = ["Action", "ActionContext", "Commands", "Phase", "TryAgain", "all_actions", "find", "main", "perform"]

OK, FAILED, USAGE, RETRY, SKIPPED = 0, 1, 2, 75, 77
_MAX_EVENT = 1 << 20

# Every action's module defines ACTION; the order is that of the hooks.
_MODULES: Mapping[str, str] = {
    "rng": "rng",
    "clock": "clock",
    "machine-id": "machine_id",
    "ssh-host-keys": "ssh_host_keys",
    "hostname": "hostname",
    "mac-address": "mac_address",
    "leases": "leases",
    "neighbours": "neighbours",
    "connections": "connections",
    "wireguard": "wireguard",
    "session-keys": "session_keys",
    "services": "services",
}


def find(name: str) -> Action:
    """The action of that name; ActionError lists the names there are."""
    module = _MODULES.get(name)
    if module is None:
        raise ActionError(f"there is no action {name!r}", hint="one of: " + ", ".join(_MODULES))
    action = importlib.import_module(f"vmfork.actions.{module}").ACTION
    if not isinstance(action, Action):
        raise ActionError(f"vmfork.actions.{module} defines no action")
    return action


def all_actions() -> tuple[Action, ...]:
    """Every action, in the order of the hooks."""
    return tuple(find(name) for name in _MODULES)


def perform(action: Action, context: ActionContext) -> int:
    """Run one action in one phase; what happened is said, and the result is an exit code of the hook contract."""
    deeds: Mapping[Phase, Callable[[ActionContext], None] | None] = {
        Phase.AFTER_FORK: action.after_fork,
        Phase.BEFORE_SNAPSHOT: action.before_snapshot,
        Phase.AFTER_SNAPSHOT: action.after_snapshot,
    }
    try:
        deed = deeds[context.phase]
        if deed is None:
            raise ActionSkipped(f"nothing to do {context.phase.value.replace('-', ' ')}")
        if action.identity and context.phase is Phase.AFTER_FORK:
            context.require_rotation()
        deed(context)
    except ActionSkipped as skipped:
        context.say(f"skipped: {skipped}")
        return SKIPPED
    except (VmforkError, OSError) as error:
        _complain(error)
        return RETRY if isinstance(error, TryAgain) else FAILED
    return OK


def main(
    name: str,
    argv: Sequence[str],
    *,
    settings: Mapping[str, str] | None = None,
    environment: Mapping[str, str] | None = None,
    stdin: int = 0,
) -> int:
    """`vmforkctl action NAME [PHASE] [--dry-run] [--identity=rotate|keep] [--root DIR]`.

    A person's choice of one action is the consent to change identity, unless `--identity=keep` or the environment of
    a hook says otherwise. `settings` are the hook's own keys; without it they are read from the configuration.
    """
    env = os.environ if environment is None else environment
    try:
        action = find(name)
        asked = _parse(argv, env)
        event = _read_event(env, stdin)
    except VmforkError as error:
        _complain(error)
        return USAGE if isinstance(error, UsageError) else FAILED
    hook = env.get("VMFORK_HOOK") or action.hook
    early = _boot_goes_on(asked.paths, env.get("VMFORK_KIND"))
    context = ActionContext(
        paths=asked.paths,
        run=Commands(asked.paths, deadline_sec=_seconds(env.get("VMFORK_DEADLINE_SEC")), early=early),
        settings=config.load(asked.paths).hook(hook).keys if settings is None else settings,
        event=event,
        identity=asked.identity,
        phase=asked.phase,
        dry_run=asked.dry_run,
        early=early,
        token=_token(env, event),
    )
    return perform(action, context)


class UsageError(ActionError):
    """The command line is not understood."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Asked:
    """What the command line asks an action for."""

    paths: Paths
    phase: Phase
    dry_run: bool
    identity: IdentityPolicy


def _parse(argv: Sequence[str], env: Mapping[str, str]) -> _Asked:
    root, phase = env.get("VMFORK_ROOT", ""), Phase.AFTER_FORK
    dry_run = env.get("VMFORK_DRY_RUN", "") not in ("", "0", "no")
    identity = env.get("VMFORK_IDENTITY") or IdentityPolicy.ROTATE.value
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        option, equals, value = word.partition("=")
        if option in ("--root", "--identity") and not equals:
            if not rest:
                raise UsageError(f"{option} needs a value")
            value = rest.pop(0)
        if word in ("-n", "--dry-run"):
            dry_run = True
        elif option == "--root":
            root = value
        elif option == "--identity":
            identity = value
        elif word in tuple(Phase):
            phase = Phase(word)
        else:
            raise UsageError(f"{word!r} is not understood", hint="a phase is one of: " + ", ".join(Phase))
    if identity not in tuple(IdentityPolicy):
        raise UsageError(f"identity {identity!r} is not one of: " + ", ".join(IdentityPolicy))
    return _Asked(paths=Paths(root), phase=phase, dry_run=dry_run, identity=IdentityPolicy(identity))


def _read_event(env: Mapping[str, str], stdin: int) -> ForkEvent | None:
    """The event on stdin: always for a hook; by hand only from a file, since anything else may never end."""
    try:
        kind = os.fstat(stdin).st_mode
        if not stat.S_ISREG(kind) and ("VMFORK_GENERATION" not in env or os.isatty(stdin)):
            return None
        data = bytearray()
        while len(data) <= _MAX_EVENT and (chunk := os.read(stdin, 65536)):
            data += chunk
    except OSError:
        return None
    if not data.strip():
        return None
    if len(data) > _MAX_EVENT:
        raise ActionError("the event on stdin is longer than 1 MiB")
    return ForkEvent.from_json(parse_object(bytes(data), "event on stdin"))


def _token(env: Mapping[str, str], event: ForkEvent | None) -> bytes:
    if event is not None:
        return event.token
    try:
        token = bytes.fromhex(env.get("VMFORK_FORK_TOKEN", ""))
    except ValueError:
        token = b""
    return token if len(token) == 16 else os.urandom(16)


def _seconds(text: str | None) -> float | None:
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if 0 < value < 1e6 else None


def _boot_goes_on(paths: Paths, kind: str | None) -> bool:
    """A cold fork is handled before sysinit.target is reached (early) or long after; only the manager knows which."""
    if kind != Kind.COLD:
        return False
    run = Commands(paths)
    return run.systemd and not run.is_active("sysinit.target")


def _complain(error: Exception) -> None:
    print(f"error: {error}", file=sys.stderr, flush=True)
    hint = getattr(error, "hint", None)
    if hint:
        print(f"hint: {hint}", file=sys.stderr, flush=True)
