# SPDX-License-Identifier: Apache-2.0
"""The verbs `status`, `list` and `sources`: what is known, in a form that can be read at night."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Sequence

from vmfork import __version__, history
from vmfork.cli import EXIT_NO_DAEMON
from vmfork.cli.localview import local_sources
from vmfork.cli.output import GREEN, RED, YELLOW, print_fields, print_json, print_table, remark, wants_json
from vmfork.cli.reach import call, daemon_status
from vmfork.errors import DaemonUnreachable, InputError, Unavailable
from vmfork.jsonfields import Fields, JsonObject, JsonValue
from vmfork.model import EventState, ForkEvent, HookOutcome, HookResult, SourceStatus
from vmfork.page import read_page
from vmfork.paths import Paths
from vmfork.state import load_remembered

_PAGE_STATES = ("settled", "reacting", "failed")
_NOT_RUNNING = "vmforkd is not running: nobody watches for forks now"
_HOW_TO_START = "systemctl start vmforkd"
_STATE_COLOURS = {"settled": GREEN, "reacting": YELLOW, "failed": RED, "event": GREEN, "timer": YELLOW, "none": RED}


def status(options: argparse.Namespace) -> int:
    """Print the status; without a daemon what the page says, and exit 3."""
    paths = Paths.from_environment()
    found = daemon_status(paths)
    runs = found is not None
    shown = found if found is not None else _status_of_page(paths)
    if wants_json(options):
        print_json(options, _public(shown))
    elif not options.quiet:
        _print_status(shown, runs=runs)
    if not runs:
        print(f"vmforkctl: {_NOT_RUNNING}\nhint: {_HOW_TO_START}", file=sys.stderr)
    return 0 if runs else EXIT_NO_DAEMON


def _public(found: JsonObject) -> JsonObject:
    """Hints belong to `doctor`; the sources of the status have the four fields of the contract."""
    sources = [SourceStatus.from_json(one).to_json() for one in Fields(found, "status").objects("sources")]
    return {**found, "sources": list[JsonValue](sources)}


def _status_of_page(paths: Paths) -> JsonObject:
    """What can be said without a daemon; a page that is missing or broken gives nulls."""
    generation: int | None = None
    state: str | None = None
    with contextlib.suppress(Unavailable, InputError):
        content = read_page(paths.generation_page)
        generation = content.generation
        state = _PAGE_STATES[content.state] if content.state < len(_PAGE_STATES) else None
    forks = _forks_on_disk(paths)
    return {
        "generation": generation,
        "state": state,
        # Whatever a killed daemon left on the page: nobody answers, so nobody watches.
        "detection": "none",
        "generation_id": None,
        "generation_tag": None,
        "sources": [],
        "last_fork": forks[-1].to_json() if forks else None,
        "identity": None,
        "version": __version__,
        "stragglers": [],
        "problems": [],
    }


def _print_status(found: JsonObject, *, runs: bool) -> None:
    fields = Fields(found, "status")
    generation = fields.integer_or_none("generation")
    state = fields.text_or_none("state") or "unknown"
    detection = fields.text("detection")
    lines: list[tuple[str, str] | tuple[str, str, str]] = [
        ("Generation", "no page" if generation is None else str(generation)),
        ("State", state, _STATE_COLOURS.get(state, RED)),
        ("Detection", detection + ("" if runs else " (vmforkd is not running)"), _STATE_COLOURS.get(detection, RED)),
    ]
    live = [one.text("name") for one in fields.objects("sources") if one.flag("live")]
    if live:
        lines.append(("Live sources", ", ".join(dict.fromkeys(live))))
    identity = fields.object_or_none("identity")
    if identity is not None:
        lines.append(("Identity", f"{identity.text('policy')}: {identity.text('reason')}"))
    tag = fields.text_or_none("generation_tag")
    if tag is not None:
        lines.append(("ID tag", tag))
    last = fields.object_or_none("last_fork")
    lines.append(("Last fork", "none" if last is None else _one_line(ForkEvent.from_json(last))))
    for straggler in fields.objects("stragglers"):
        who = f"{straggler.text_or_none('command') or '?'} (PID {straggler.integer('pid')})"
        verb = "has not acknowledged in time" if straggler.flag("overdue") else "has not acknowledged yet"
        lines.append(("Waiting for", f"{who} {verb}"))
    lines += [("Problem", text, RED) for text in fields.texts("problems")]
    print_fields(lines)


def _one_line(event: ForkEvent) -> str:
    fields = Fields(event.to_json(), "fork")
    bad = "".join(f", {hook}" for hook in _bad_hooks(event))
    return f"{fields.text('detected_at')[:19]}Z, {event.kind.value}, by {_edges(event)}, {event.state.value}{bad}"


def _edges(event: ForkEvent) -> str:
    return ", ".join(event.edges) or "saved state"


def _bad_hooks(event: ForkEvent) -> list[str]:
    """Each hook that did not do its work, and how it ended."""
    fine = (HookOutcome.OK, HookOutcome.SKIPPED, HookOutcome.MASKED)
    return [f"{hook.name} {_ending(hook)}" for hook in event.hooks if hook.result not in fine]


def _ending(hook: HookResult) -> str:
    if hook.result is HookOutcome.FAILED and hook.exit_code is not None:
        return f"failed (exit code {hook.exit_code})"
    if hook.result is HookOutcome.FAILED and hook.signal is not None:
        return f"failed (signal {hook.signal})"
    return hook.result.value


def forks(options: argparse.Namespace) -> int:
    """Print the forks, newest last: from the daemon, else, as root, from its files."""
    paths = Paths.from_environment()
    try:
        answer = call(
            paths, "ListForks", {"limit": None if options.lines is None else min(options.lines, history.KEPT)}
        )
        found = [ForkEvent.from_json(one) for one in answer.objects("forks")]
        as_json: Sequence[JsonObject] = [one.to_json(with_ids=True) for one in found]
    except DaemonUnreachable:
        found = _forks_on_disk(paths, complain=True)
        as_json = [one.to_json(with_ids=True) for one in found]
    if options.lines is not None:
        start = max(0, len(found) - options.lines)
        found, as_json = found[start:], as_json[start:]
    if wants_json(options):
        print_json(options, as_json)
        return 0
    print_table(
        ("GEN", "WHEN", "KIND", "EDGES", "LATENCY", "IDENTITY", "RESULT"),
        [_row(event) for event in found],
        legend=not options.no_legend,
        tones=[RED if event.state is EventState.FAILED else None for event in found],
        notes=[_bad_hooks(event) for event in found],
    )
    if not found and not options.no_legend:
        remark(options, "no fork was noticed so far")
    return 0


def _row(event: ForkEvent) -> tuple[str, ...]:
    latency = "-" if event.detect_latency_us is None else f"{event.detect_latency_us / 1000:.1f} ms"
    when = str(event.to_json()["detected_at"])[:19].replace("T", " ")
    ran = sum(hook.result is HookOutcome.OK for hook in event.hooks)
    return (
        str(event.generation),
        when,
        event.kind.value,
        ",".join(event.edges) or "-",
        latency,
        event.identity.policy.value,
        f"{event.state.value}, {ran} ok",
    )


def _forks_on_disk(paths: Paths, *, complain: bool = False) -> list[ForkEvent]:
    """History plus the fork that is still being reacted to; empty where the files may not be read."""
    try:
        known = list(history.load(paths).events)
        remembered = load_remembered(paths)
    except InputError as error:
        if complain:
            raise
        print(f"vmforkctl: {error}", file=sys.stderr)
        return []
    newest = None if remembered is None else remembered.event
    if newest is not None:
        known = [event for event in known if event.token != newest.token] + [newest]
    return known


def sources(options: argparse.Namespace) -> int:
    """Print every source, from the daemon, else as far as this process can see."""
    paths = Paths.from_environment()
    found = daemon_status(paths)
    if found is None:
        statuses = local_sources(paths)
        remark(options, f"{_NOT_RUNNING}; this is what it could see")
    else:
        statuses = tuple(SourceStatus.from_json(one) for one in Fields(found, "status").objects("sources"))
    if wants_json(options):
        print_json(options, [one.to_json() for one in statuses])
        return 0 if found is not None else EXIT_NO_DAEMON
    print_table(
        ("SOURCE", "ROLE", "LIVE", "DETAIL"),
        [(one.name, one.role.value, "yes" if one.live else "no", one.detail) for one in statuses],
        legend=not options.no_legend,
    )
    return 0 if found is not None else EXIT_NO_DAEMON
