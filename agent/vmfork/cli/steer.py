# SPDX-License-Identifier: Apache-2.0
"""The verbs by which root steers the daemon: trigger, rotate, prepare, resume, reload."""

from __future__ import annotations

import argparse
import select
import sys

from vmfork.cli import EXIT_FAILED
from vmfork.cli.output import GREEN, colour, print_json, print_table, remark, wants_json
from vmfork.cli.reach import call, connect
from vmfork.errors import VmforkError
from vmfork.jsonfields import Fields, JsonObject
from vmfork.model import EventState, ForkEvent
from vmfork.paths import Paths
from vmfork.reactor.reports import TerminalReporter
from vmfork.varlink.client import Client, RemoteError

# Hooks may take their time; each has its own limit, and the daemon knows them.
_PATIENCE_SEC = 3600.0
# How often a person at a terminal is shown what has ended meanwhile: the stream tells the end of all only.
_LOOK_SEC = 0.1
_FINE = ("ok", "skipped", "masked")


def trigger(options: argparse.Namespace) -> int:
    """Act as if this guest was forked; on a terminal, show what the hooks do. 0 whatever they end with."""
    paths = Paths.from_environment()
    if options.dry_run:
        return _plan(options, options.identity)
    asked: JsonObject = {"reason": options.reason, "identity": options.identity}
    if _is_watched(options):
        _followed(options, paths, asked)
        return 0
    event = ForkEvent.from_json(call(paths, "Trigger", asked, admin=True).object("event"))
    if wants_json(options):
        print_json(options, event.to_json(with_ids=True))
    elif not options.quiet:
        print(_heading(event))
    return 0


def rotate(options: argparse.Namespace) -> int:
    """A manual fork that rotates the identity, followed to its end."""
    paths = Paths.from_environment()
    if options.dry_run:
        return _plan(options, "rotate")
    event = _followed(options, paths, {"reason": "vmforkctl rotate", "identity": "rotate"})
    return EXIT_FAILED if event is None else _result(options, event)


def _heading(event: ForkEvent) -> str:
    return f"generation {event.generation}, identity: {event.identity.policy.value} ({event.identity.reason})"


def _is_watched(options: argparse.Namespace) -> bool:
    """Whether a person looks who wants to see hook by hook what happens."""
    return sys.stdout.isatty() and not wants_json(options) and not options.quiet


def _followed(options: argparse.Namespace, paths: Paths, asked: JsonObject) -> ForkEvent | None:
    """Trigger a fork and wait for the end of its reaction, or of a newer one's; None where the daemon ended before."""
    reporter = _reporter() if _is_watched(options) else None
    with connect(paths, admin=True, timeout=_PATIENCE_SEC) as stream, connect(paths, admin=True) as other:
        stream.send("io.vmfork.Subscribe", {"track": False, "after": None}, more=True)
        next(stream.replies(timeout=_PATIENCE_SEC))
        answer = Fields(other.call("io.vmfork.Trigger", asked), "answer to Trigger")
        event = ForkEvent.from_json(answer.object("event"))
        if reporter is not None:
            print(_heading(event), flush=True)
        elif asked["identity"] == "rotate":
            remark(options, f"generation {event.generation}: rotating the identity of this guest")
        generation = event.generation
        while stream.streaming:
            news = select.select([stream], [], [], None if reporter is None else _LOOK_SEC)[0]
            ended = _ended(stream, event.generation) if news else None
            if reporter is not None and (ended is not None or not news):
                now = ended or _last_fork(other)
                if now is not None and now.generation > generation:
                    print(f"superseded by {_heading(now)}", flush=True)
                    generation, reporter = now.generation, _reporter()
                reporter.follow(now.hooks if now is not None and now.generation == generation else ())
            if ended is not None:
                if reporter is not None:
                    reporter.finished(ended.state, ended.clock_step_ns)
                return ended
    return None


def _reporter() -> TerminalReporter:
    return TerminalReporter(colour=colour("", GREEN) != "")


def _ended(stream: Client, generation: int) -> ForkEvent | None:
    """The event of a notice, if one has arrived, that the reaction to this generation or a newer one is over."""
    while (reply := stream.receive()) is not None:
        notice = Fields(reply, "reply").object("parameters")
        shown = notice.object_or_none("event")
        if notice.text("notice") == "settled" and shown is not None:
            event = ForkEvent.from_json(shown)
            if event.generation >= generation:
                return event
    return None


def _last_fork(client: Client) -> ForkEvent | None:
    status = Fields(client.call("io.vmfork.GetStatus", {}), "answer to GetStatus").object("status")
    shown = status.object_or_none("last_fork")
    return None if shown is None else ForkEvent.from_json(shown)


def _result(options: argparse.Namespace, event: ForkEvent) -> int:
    if wants_json(options):
        print_json(options, event.to_json(with_ids=True))
    elif not options.quiet and not _is_watched(options):
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
    asked: JsonObject = {"template": options.template, "deadline_sec": options.deadline}
    try:
        with connect(paths, admin=True, timeout=_PATIENCE_SEC) as client:
            answer = Fields(client.call("io.vmfork.Prepare", asked), "answer to Prepare")
    except RemoteError as error:
        if error.name != "io.vmfork.Superseded":
            raise
        raise VmforkError("not prepared: a fork, resume or the deadline came before everybody was ready") from error
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
