# SPDX-License-Identifier: Apache-2.0
"""The verbs about hooks: hooks, plan, react, actions, action. All but react work without a daemon.

What react does not need is imported inside the other verbs: it delays the first hook after a fork.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import replace

from vmfork import config, settings, sysd
from vmfork.cli.output import print_json, print_table, remark, wants_json
from vmfork.errors import InputError, VmforkError
from vmfork.jsonfields import Fields, JsonObject
from vmfork.model import HookOutcome, Identity, IdentityPolicy, Kind
from vmfork.paths import Paths
from vmfork.reactor.discovery import Hook, discover, runnable
from vmfork.reactor.engine import Engine
from vmfork.reactor.inprocess import InProcess, action_of
from vmfork.reactor.phases import Occasion
from vmfork.reactor.reports import TerminalReporter
from vmfork.reactor.session import configured, generation_of
from vmfork.reactor.session import react as run_reactor

IDENTIFIER = "vmfork-react"


def hooks(options: argparse.Namespace) -> int:
    """Every entry of both hooks directories, and why some do not run."""
    paths = Paths.from_environment()
    found = discover(paths, config.load(paths).hook)
    _show(options, found)
    hints = [hook.hint for hook in found if hook.hint and hook.order is not None]
    for hint in dict.fromkeys(hints):
        remark(options, f"hint: {hint}")
    return 0


def plan(options: argparse.Namespace) -> int:
    """What a fork would run now, in that order, under the identity policy that would hold."""
    paths = Paths.from_environment()
    loaded = config.load(paths)
    identity = _identity(paths, loaded, options.identity)
    _show(options, _planned(paths, loaded, identity))
    if not wants_json(options) and not options.no_legend:
        remark(options, f"identity: {identity.policy.value} ({identity.reason})")
    return 0


def react(options: argparse.Namespace) -> int:
    """The reactor; with --dry-run, the package's own hooks say what they would do, and the others are only named."""
    paths = Paths.from_environment()
    sysd.set_up_logging(IDENTIFIER)
    if options.dry_run:
        return _rehearse(options, paths)
    watcher = TerminalReporter() if sys.stdout.isatty() and not options.quiet else None
    return run_reactor(paths, parent=options.parent, watcher=watcher)


def actions(options: argparse.Namespace) -> int:
    """The package's own repairs."""
    from vmfork import actions as repairs

    found = repairs.all_actions()
    if wants_json(options):
        listed: list[JsonObject] = [
            {"name": one.name, "hook": one.hook, "identity": one.identity, "summary": one.summary} for one in found
        ]
        print_json(options, listed)
    else:
        rows = [(one.name, one.hook, "identity" if one.identity else "", one.summary) for one in found]
        print_table(("NAME", "HOOK", "CLASS", "DOES"), rows, legend=not options.no_legend)
    return 0


def action(options: argparse.Namespace) -> int:
    """One repair by hand, or for its shipped hook."""
    from vmfork import actions as repairs

    argv = [options.phase, *(["--dry-run"] if options.dry_run else [])]
    return repairs.main(options.name, argv)


def _rehearse(options: argparse.Namespace, paths: Paths) -> int:
    loaded = config.load(paths)
    rules = configured(paths)
    identity = _identity(paths, loaded, "auto")
    chosen = [hook for hook in _planned(paths, loaded, identity) if hook.enabled]
    # An admin's hook may not know of VMFORK_DRY_RUN, and a rehearsal must not change anything.
    own = [hook for hook in chosen if action_of(hook) is not None]
    for hook in chosen:
        if hook not in own:
            print(f"would run {hook.program}")
    occasion = Occasion(generation=generation_of(paths), identity=identity.policy, dry_run=True, root=paths.root)
    reporter = TerminalReporter()
    with Engine(occasion, rules.limits, reporter, starters=[InProcess(rules.keys)]) as engine:
        engine.run(own)
    return 0


def _planned(paths: Paths, loaded: config.Config, identity: Identity) -> Sequence[Hook]:
    found = runnable(discover(paths, loaded.hook))
    if identity.policy is IdentityPolicy.ROTATE:
        return found
    return [
        replace(hook, state=HookOutcome.SKIPPED, reason=f"the identity is kept: {identity.reason}")
        if hook.enabled and _is_of_identity(hook)
        else hook
        for hook in found
    ]


def _is_of_identity(hook: Hook) -> bool:
    from vmfork import actions as repairs

    name = action_of(hook)
    try:
        return name is not None and repairs.find(name).identity
    except VmforkError:
        return False


def _identity(paths: Paths, loaded: config.Config, asked: str) -> Identity:
    """The policy that a fork would get: as asked for, as the daemon says, else as it would choose."""
    from vmfork import policy
    from vmfork.cli.reach import daemon_status

    if asked != "auto":
        return Identity(policy=IdentityPolicy(asked), reason=f"--identity={asked}")
    status = daemon_status(paths)
    try:
        if status is not None:
            return Identity.from_json(Fields(status, "GetStatus").object("identity"))
    except InputError:
        remark(argparse.Namespace(quiet=False), "the daemon is of another version; asking the configuration instead")
    template = None
    if loaded.get(settings.TEMPLATE):
        template = "Template=yes is configured"
    elif os.path.exists(paths.template_mark) or os.path.exists(paths.template_mark_run):
        template = "this guest was declared a template"
    return policy.choose(loaded.get(settings.IDENTITY), policy.Evidence(kind=Kind.LIVE, template=template))


def _show(options: argparse.Namespace, found: Sequence[Hook]) -> None:
    if wants_json(options):
        print_json(options, [hook.to_json() for hook in found])
        return
    rows = []
    for hook in found:
        runs = "yes" if hook.enabled else "no"
        order = "-" if hook.order is None else f"{hook.order:02}"
        rows.append((order, hook.name, hook.origin.value, runs, hook.reason or ""))
    print_table(("NN", "HOOK", "FROM", "RUNS", "REASON"), rows, legend=not options.no_legend)
