# SPDX-License-Identifier: Apache-2.0
"""The verbs by which root steers the daemon: trigger, rotate, prepare, resume, reload."""

from __future__ import annotations

import argparse
import sys

from vmfork.cli import EXIT_FAILED
from vmfork.cli.output import print_json, print_table, remark, wants_json
from vmfork.cli.reach import call, connect
from vmfork.jsonfields import Fields, JsonObject
from vmfork.model import EventState, ForkEvent
from vmfork.paths import Paths
from vmfork.varlink.client import RemoteError

# Hooks may take their time; each has its own limit, and the daemon knows them.
_PATIENCE_SEC = 3600.0
_FINE = ("ok", "skipped", "masked")


def trigger(options: argparse.Namespace) -> int:
    """Act as if this guest was forked."""
    paths = Paths.from_environment()
    if options.dry_run:
        return _plan(options, options.identity)
    answer = call(paths, "Trigger", {"reason": options.reason, "identity": options.identity}, admin=True)
    event = ForkEvent.from_json(answer.object("event"))
    if wants_json(options):
        print_json(options, event.to_json(with_ids=True))
    elif not options.quiet:
        print(f"generation {event.generation}, identity: {event.identity.policy.value} ({event.identity.reason})")
    return 0


def rotate(options: argparse.Namespace) -> int:
    """A manual fork that rotates the identity, followed to its end."""
    paths = Paths.from_environment()
    if options.dry_run:
        return _plan(options, "rotate")
    with connect(paths, admin=True, timeout=_PATIENCE_SEC) as stream:
        replies = stream.stream("io.vmfork.Subscribe", {"track": False, "after": None})
        next(replies)
        asked = {"reason": "vmforkctl rotate", "identity": "rotate"}
        event = ForkEvent.from_json(call(paths, "Trigger", dict(asked), admin=True).object("event"))
        remark(options, f"generation {event.generation}: rotating the identity of this guest")
        for reply in replies:
            notice = Fields(reply, "notice")
            shown = notice.object_or_none("event")
            if notice.text("notice") == "settled" and shown is not None:
                return _result(options, ForkEvent.from_json(shown))
    return EXIT_FAILED


def _result(options: argparse.Namespace, event: ForkEvent) -> int:
    if wants_json(options):
        print_json(options, event.to_json(with_ids=True))
    elif not options.quiet:
        _print_hooks(options, [hook.to_json() for hook in event.hooks])
    failed = _complain([hook.to_json() for hook in event.hooks])
    return EXIT_FAILED if failed or event.state is EventState.FAILED else 0


def _complain(hooks: list[JsonObject]) -> bool:
    """Name the hooks that failed, also for -q; True if there is one."""
    failed = [hook for hook in hooks if hook["result"] not in _FINE]
    for hook in failed:
        print(f"vmforkctl: {hook['name']}: {hook['result']}", file=sys.stderr)
    if failed:
        print("hint: what they said: journalctl -u vmfork-react", file=sys.stderr)
    return bool(failed)


def _print_hooks(options: argparse.Namespace, hooks: list[JsonObject]) -> None:
    rows = []
    for hook in hooks:
        duration = hook["duration_ms"]
        rows.append((str(hook["name"]), "-" if duration is None else f"{duration} ms", str(hook["result"])))
    print_table(("HOOK", "TIME", "RESULT"), rows, legend=not options.no_legend)


def _plan(options: argparse.Namespace, identity: str) -> int:
    from vmfork.cli.hooks import plan

    options.identity = identity
    return plan(options)


def prepare(options: argparse.Namespace) -> int:
    """Get ready for a snapshot; fails where somebody is not ready, and says who."""
    paths = Paths.from_environment()
    if options.dry_run:
        print("would tell the subscribers, wait for them, and run these hooks with before-snapshot, last first:")
        return _plan(options, "auto")
    with connect(paths, admin=True, timeout=_PATIENCE_SEC) as client:
        asked: JsonObject = {"template": options.template, "deadline_sec": options.deadline}
        answer = Fields(client.call("io.vmfork.Prepare", asked), "answer to Prepare")
    late = answer.objects("not_ready")
    hooks = [_hook(one) for one in answer.objects("hooks")]
    if wants_json(options):
        print_json(
            options,
            {
                "snapshot": answer.integer("snapshot"),
                "not_ready": [{"uid": one.integer("uid"), "pid": one.integer("pid")} for one in late],
                "hooks": list(hooks),
            },
        )
    elif not options.quiet:
        _print_hooks(options, hooks)
    for one in late:
        name = one.text_or_none("command") or "?"
        print(f"vmforkctl: {name} (PID {one.integer('pid')}) is not ready", file=sys.stderr)
    failed = _complain(hooks)
    remark(options, "ready for the snapshot" if not late and not failed else "not everything is ready")
    return EXIT_FAILED if late or failed else 0


def _hook(fields: Fields) -> JsonObject:
    return {
        "name": fields.text("name"),
        "result": fields.text("result"),
        "duration_ms": fields.integer_or_none("duration_ms"),
    }


def resume(options: argparse.Namespace) -> int:
    """The snapshot was taken and this guest goes on, or it was called off."""
    paths = Paths.from_environment()
    if options.dry_run:
        print("would run these hooks with after-snapshot:")
        return _plan(options, "auto")
    try:
        with connect(paths, admin=True, timeout=_PATIENCE_SEC) as client:
            answer = Fields(client.call("io.vmfork.Resume", {}), "answer to Resume")
    except RemoteError as error:
        if error.name != "io.vmfork.NotPrepared":
            raise
        remark(options, "nothing was prepared")
        return 0
    hooks = [_hook(one) for one in answer.objects("hooks")]
    if wants_json(options):
        print_json(options, {"hooks": list(hooks)})
    elif not options.quiet:
        _print_hooks(options, hooks)
    return EXIT_FAILED if _complain(hooks) else 0


def reload(options: argparse.Namespace) -> int:
    """Have the daemon read its configuration again."""
    problems = call(Paths.from_environment(), "Reload", admin=True).texts("problems")
    for problem in problems:
        print(f"vmforkctl: {problem}", file=sys.stderr)
    if wants_json(options):
        print_json(options, {"problems": list(problems)})
    return EXIT_FAILED if problems else 0
