# SPDX-License-Identifier: Apache-2.0
"""What the last detector left behind: its memory and its note in /run, its state and history in /var.

Read once, at the start. A file that was read and not understood is set aside, and a new one begun. One that the kernel
refuses to read may hold a fork that nobody handled, and the ID that the next one is told by: the start fails then, and
the service manager tries again, which is better than to go on as if there had been nothing.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from vmfork import history, intent, state
from vmfork.annotations import Any, TypeVar
from vmfork.errors import InputError, UnreadableError
from vmfork.model import EventState, ForkEvent
from vmfork.paths import Paths
from vmfork.state import Remembered, Saved

log = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Recalled:
    """`same_boot`: there is something of this boot to continue from. `only_noted`: detector.json lacks its newest fork.

    `problems` has a sentence for each file that was set aside, by the name under which it is kept.
    """

    saved: Saved
    remembered: Remembered
    same_boot: bool
    only_noted: bool
    problems: dict[str, str] = field(default_factory=dict)


def recall(paths: Paths) -> Recalled:
    """All that is left; UnreadableError where that cannot be known now."""
    broken: dict[str, InputError] = {}
    saved = _understood(paths.state, lambda: state.load_saved(paths), broken) or _from_history(paths)
    remembered = _understood(paths.detector_memory, lambda: state.load_remembered(paths), broken)
    noted = _understood(paths.detector_intent, lambda: intent.load(paths.detector_intent), broken)
    boot_id = _known(paths.boot_id, lambda: state.boot_id(paths))
    same_boot = remembered is not None and remembered.boot_id == boot_id
    if remembered is None or not same_boot:
        # Without a memory in RAM, a saved state of this very boot is the next best thing to continue from.
        remembered = Remembered(boot_id=boot_id, generation=saved.generation)
    if not remembered.tag_key:
        # Without a key the tag would be a plain hash of a secret.
        remembered = replace(remembered, tag_key=os.urandom(state.TAG_KEY_BYTES))
    only_noted = noted is not None and noted.boot_id == boot_id and noted.event.generation > remembered.generation
    if noted is not None and only_noted:
        # The interrupt counters of before would tell of this fork once more.
        seen: dict[str, Any] = {"truths": noted.truths, "credits": noted.credits, "interrupts": {}}
        remembered = remembered.with_fork(noted.event, kmsg_sequence=noted.kmsg_sequence, **seen)
    return Recalled(
        saved=saved,
        remembered=remembered,
        same_boot=same_boot or only_noted,
        only_noted=only_noted,
        # Only now, when all was read: a start that fails must find them again, to report them.
        problems=_set_aside(broken),
    )


def _known(path: str, read: Callable[[], T]) -> T:
    try:
        return read()
    except UnreadableError as error:
        hint = "a fork that is not handled yet would be lost without it, so vmforkd does not start; try again"
        raise UnreadableError(path, error.problem, hint=hint) from error


def _understood(path: str, load: Callable[[], T | None], broken: dict[str, InputError]) -> T | None:
    try:
        return _known(path, load)
    except UnreadableError:
        raise
    except InputError as error:
        broken[path] = error
        return None


def _from_history(paths: Paths) -> Saved:
    """Without state.json: the counter never goes back, and the last fork that was handled led to an ID, too."""
    events: list[ForkEvent] = []
    try:
        events.extend(_known(paths.history, lambda: list(filter(None, history.newest_first(paths)))))
    except UnreadableError:
        raise
    except InputError as error:
        log.error("%s; the generation begins anew", error)
    # A superseded fork was never handled: the one that took its place may still wait for its reaction.
    handled = next((event for event in events if event.state is not EventState.SUPERSEDED), None)
    return Saved(
        generation=max((event.generation for event in events), default=1),
        handled_token=None if handled is None else handled.token,
        generation_id=None if handled is None else handled.generation_id,
    )


def _set_aside(broken: Mapping[str, InputError]) -> dict[str, str]:
    problems: dict[str, str] = {}
    for path, error in broken.items():
        log.error("%s; it is set aside and a new one begun", error)
        # Stays until the daemon is started again: somebody should look at what was kept.
        problems[f"{path}.broken"] = f"{error}; kept as {path}.broken"
        try:
            state.set_aside(path)
        except OSError as refusal:
            log.error("%s: %s", path, refusal.strerror)
            problems[path] = f"{path}: {refusal.strerror}"
    return problems
