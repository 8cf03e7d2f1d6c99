# SPDX-License-Identifier: Apache-2.0
"""What must hold after any play, whoever was killed: no fork lost, none invented, all files valid, every hook ran."""

from __future__ import annotations

import os
from pathlib import Path

from torture.past import is_past
from torture.scenario import HOOKS, Scenario
from vmfork import history, state
from vmfork.errors import VmforkError
from vmfork.history import KEPT, SLACK
from vmfork.model import EventState, ForkEvent, IdentityPolicy
from vmfork.page import DETECTION_NONE


def judge(scenario: Scenario) -> None:
    """Note each broken promise in the scenario's row."""
    row, paths = scenario.row, scenario.guest.paths
    last = 1 + len(scenario.forks)
    page = scenario.page()
    row.check(page is not None and page.generation == last, f"the page is not valid, or not at generation {last}")
    row.check(page is not None and page.detection == DETECTION_NONE, "after the stop the page says somebody watches")
    row.check(not any(Path(paths.state).parent.glob("*.broken")), "the daemon found its own state broken")
    try:
        found = history.load(paths)
    except VmforkError as error:
        row.check(False, f"a file is broken: {error}")
        return
    events = tuple(event for event in found.events if not is_past(event))
    row.seen += len(events)
    row.check(found.unreadable_lines == 0, f"{found.unreadable_lines} lines of the history cannot be read")
    _judge_history(scenario, events)
    past = [int.from_bytes(event.token, "big") for event in found.events if is_past(event)]
    if past:
        _judge_past(scenario, past)
    if events:
        newest = events[-1]
        row.check(page is not None and page.token == newest.token, "the page has another token than the history")
        _judge_state(scenario, newest)
        _judge_hooks(scenario, events)


def judge_called_off(scenario: Scenario) -> None:
    """After a snapshot that was called off, moreover: all of it is undone, and this guest is no template."""
    judge(scenario)
    _judge_snapshot(scenario, [IdentityPolicy.KEEP])


def judge_cloned(scenario: Scenario) -> None:
    """After the fork of a template and one more, moreover: the first alone gave a new identity."""
    judge(scenario)
    _judge_snapshot(scenario, [IdentityPolicy.ROTATE, IdentityPolicy.KEEP])


def _judge_snapshot(scenario: Scenario, policies: list[IdentityPolicy]) -> None:
    row, paths = scenario.row, scenario.guest.paths
    left = [path for path in (paths.template_mark, paths.template_mark_run) if os.path.lexists(path)]
    row.check(left == [], f"marks of a template are left: {left}")
    try:
        events, remembered = history.load(paths).events, state.load_remembered(paths)
    except VmforkError as error:
        row.check(False, f"a file is broken: {error}")
        return
    row.check(remembered is not None and remembered.preparation is None, "the memory says that something is prepared")
    found = [one.identity.policy for one in events]
    row.check(found == policies, f"the identity policies of the forks were {found}")


def _judge_history(scenario: Scenario, events: tuple[ForkEvent, ...]) -> None:
    row, sent = scenario.row, scenario.forks
    generations = [event.generation for event in events]
    row.check(generations == list(range(2, 2 + len(sent))), f"the history has {generations}")
    row.check([event.generation_id for event in events] == [fork.value for fork in sent], "other IDs than were sent")
    row.check([event.kind for event in events] == [fork.kind for fork in sent], "a fork is of another kind")
    row.check(len({event.token for event in events}) == len(events), "two forks have one token")


def _judge_past(scenario: Scenario, past: list[int]) -> None:
    """The history was full when the play began: the oldest were cut off, as many as are too many, and no others."""
    full = KEPT + SLACK
    newest = list(range(full - (KEPT - len(scenario.forks)), full))
    scenario.row.check(past == newest, f"{len(past)} forks from before the play are kept, or not the newest")
    lines = Path(scenario.guest.paths.history).read_bytes().count(b"\n")
    scenario.row.check(lines < full, f"the history was not cut: it has {lines} lines")


def _judge_state(scenario: Scenario, newest: ForkEvent) -> None:
    row = scenario.row
    row.check(newest.state is EventState.SETTLED, f"the newest fork is {newest.state}")
    try:
        saved, remembered = state.load_saved(scenario.guest.paths), state.load_remembered(scenario.guest.paths)
    except VmforkError as error:
        row.check(False, f"a file is broken: {error}")
        return
    if saved is None or remembered is None:
        row.check(False, "the state or the memory is missing")
        return
    row.check(saved.handled_token == newest.token, "the newest fork is not the handled one on disk")
    is_newest = (saved.generation_id, saved.generation) == (scenario.forks[-1].value, 1 + len(scenario.forks))
    row.check(is_newest, "the state on disk is an older one")
    row.check(remembered.handled and remembered.event is not None, "the memory says the fork is not handled")


def _judge_hooks(scenario: Scenario, events: tuple[ForkEvent, ...]) -> None:
    row, ran = scenario.row, scenario.ran().splitlines()
    row.hooks += sum(line.startswith("end ") for line in ran)
    for hook in HOOKS:
        row.check(f"end {hook} {events[-1].token.hex()}" in ran, f"{hook} did not run for the newest fork")
    tokens = {line.split()[2] for line in ran if line.startswith("start ")}
    row.check(tokens <= {event.token.hex() for event in events}, "a hook ran for a fork that nobody recorded")
    row.check(not any(line.startswith("overlap ") for line in ran), "two reactors ran at once")
