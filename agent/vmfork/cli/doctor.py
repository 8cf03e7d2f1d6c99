# SPDX-License-Identifier: Apache-2.0
"""`vmforkctl doctor`: can a fork be noticed here? The verdict first, every source and its reason, next steps last."""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass

from vmfork import config
from vmfork.cli import EXIT_CANNOT_NOTICE, EXIT_FAILED, EXIT_NO_DAEMON
from vmfork.cli.diagnosis import Guest, look, next_steps
from vmfork.cli.localview import local_sources
from vmfork.cli.output import GREEN, GREY, RED, YELLOW, colour, print_json, print_list, print_table, wants_json
from vmfork.cli.reach import daemon_status
from vmfork.jsonfields import Fields, JsonObject, JsonValue
from vmfork.model import Role, SourceStatus
from vmfork.paths import Paths

# What wakes the detector by itself; `timer` and `manual` are edges too, but no answer to "who would tell us?".
_BY_EVENT = ("kmsg", "uevent", "vmclock")
_ID_TRUTHS = ("fwcfg", "devicetree", "acpi", "vmclock")


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The exit code, the sentence, and how loud it is."""

    code: int
    sentence: str
    tone: str


def doctor(options: argparse.Namespace) -> int:
    """Examine this guest and print what was found."""
    paths = Paths.from_environment()
    status = daemon_status(paths)
    if status is None:
        sources = local_sources(paths)
        problems: list[str] = list(config.load(paths).problems)
        identity = None
    else:
        fields = Fields(status, "status")
        sources = tuple(SourceStatus.from_json(one) for one in fields.objects("sources"))
        problems = list(fields.texts("problems"))
        identity = fields.object_or_none("identity")
    guest = look(paths)
    may_look = os.geteuid() == 0 or paths.is_fake or status is not None
    verdict = judge(sources, runs=status is not None, guest=guest, may_look=may_look, problems=problems)
    steps = list(_steps(guest, sources, runs=status is not None, may_look=may_look, verdict=verdict))
    policy = None if identity is None else f"{identity.text('policy')}: {identity.text('reason')}"
    if wants_json(options):
        print_json(options, _as_json(verdict, guest, sources, problems, steps, policy))
    else:
        _print(options, verdict, guest, sources, problems, steps, policy)
    return verdict.code


def judge(
    sources: tuple[SourceStatus, ...], *, runs: bool, guest: Guest, may_look: bool, problems: list[str]
) -> Verdict:
    """4 before 3 before 1: what can never work matters more than what does not work now."""
    by_event = [one.name for one in sources if one.role is Role.EDGE and one.live and one.name in _BY_EVENT]
    readable = [one.name for one in sources if one.role is Role.TRUTH and one.live and one.name in _ID_TRUTHS]
    if not may_look and not by_event and not readable and guest.bound is None:
        return Verdict(
            code=EXIT_NO_DAEMON, sentence="vmforkd is not running, and without root no more can be told.", tone=YELLOW
        )
    # An unprivileged look cannot open the log, but the driver that will write to it is there.
    if not by_event and not readable and not (guest.bound is not None and not may_look):
        return Verdict(code=EXIT_CANNOT_NOTICE, sentence="This guest cannot notice that it was forked.", tone=RED)
    if not runs:
        return Verdict(
            code=EXIT_NO_DAEMON, sentence="A fork could be noticed here, but vmforkd is not running.", tone=RED
        )
    if problems:
        return Verdict(code=EXIT_FAILED, sentence="Forks are noticed, but something needs attention.", tone=YELLOW)
    if not by_event:
        return Verdict(
            code=0,
            sentence="Forks are noticed, but only by the timer: up to one interval late, at the cost of waking up.",
            tone=YELLOW,
        )
    return Verdict(code=0, sentence=f"Forks are noticed at once, by {' and '.join(by_event)}.", tone=GREEN)


def _steps(
    guest: Guest, sources: tuple[SourceStatus, ...], *, runs: bool, may_look: bool, verdict: Verdict
) -> list[str]:
    steps = []
    if not runs and verdict.code == EXIT_NO_DAEMON:
        steps.append("systemctl enable --now vmforkd; see why it ended: journalctl -u vmforkd")
    if not may_look:
        steps.append("run this as root to see all sources")
    if verdict.tone != GREEN:
        steps += dict.fromkeys(next_steps(guest, sources))
    if verdict.code == EXIT_CANNOT_NOTICE:
        steps.append("until then, whoever restores this guest can run in it: vmforkctl trigger")
    return steps


def _as_json(
    verdict: Verdict,
    guest: Guest,
    sources: tuple[SourceStatus, ...],
    problems: list[str],
    steps: list[str],
    policy: str | None,
) -> JsonObject:
    shown: list[JsonValue] = [one.to_json(with_hint=True) for one in sources]
    return {
        "verdict": verdict.sentence,
        "exit_code": verdict.code,
        "kernel": guest.release,
        "device": guest.device,
        "bound": guest.bound,
        "identity": policy,
        "sources": shown,
        "problems": list(problems),
        "next_steps": list(steps),
    }


def _print(
    options: argparse.Namespace,
    verdict: Verdict,
    guest: Guest,
    sources: tuple[SourceStatus, ...],
    problems: list[str],
    steps: list[str],
    policy: str | None,
) -> None:
    print(colour(verdict.sentence, verdict.tone))
    if options.quiet:
        return
    facts = [
        ("kernel", guest.release),
        ("device", guest.device or "the hypervisor offers no generation ID device that this guest can see"),
        ("driver", f"bound to {guest.bound}" if guest.bound else "bound to nothing"),
        *([] if policy is None else [("identity", policy)]),
    ]
    print()
    print_table(("", ""), facts, legend=False)
    print()
    rows = [(one.name, one.role.value, "yes" if one.live else "no", one.detail) for one in sources]
    print_table(("SOURCE", "ROLE", "LIVE", "WHY"), rows, legend=not options.no_legend)
    for title, lines in (("Problems", problems), ("Next steps", steps)):
        if lines:
            print(colour(f"\n{title}:", GREY if title == "Next steps" else RED))
            print_list(lines)
