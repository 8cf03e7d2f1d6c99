# SPDX-License-Identifier: Apache-2.0
"""A disk that refuses the mark of a template while a snapshot is prepared or called off, and while a clone uses it up.

strace answers for the kernel, as in `faults`. The detector must live on, `status` must name the mark while it stands
and cannot be removed, and in the end nobody may be a template by mistake.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from support.runningdaemon import vmforkctl
from torture.crash import WORKERS
from torture.injection import Attached, strace_of
from torture.liveguest import LiveGuest
from torture.scenario import Broken
from torture.table import Row
from vmfork import history
from vmfork.errors import VmforkError
from vmfork.model import IdentityPolicy
from vmfork.paths import Paths

_CALLS = ("openat", "write", "fchmod", "fsync", "rename", "unlink")
_HOOK = 'echo "$1" >>"$VMFORK_ROOT/ran"'
_ROTATE, _KEEP = IdentityPolicy.ROTATE, IdentityPolicy.KEEP


def _both(paths: Paths) -> tuple[str, ...]:
    return tuple(f"{mark}{end}" for mark in (paths.template_mark, paths.template_mark_run) for end in ("", ".new"))


def _on_disk(paths: Paths) -> tuple[str, ...]:
    return (paths.template_mark, f"{paths.template_mark}.new")


def _in_ram(paths: Paths) -> tuple[str, ...]:
    return (paths.template_mark_run, f"{paths.template_mark_run}.new")


@dataclass(frozen=True, slots=True, kw_only=True)
class MarkFault:
    """`calls` on these files fail with `error`."""

    error: str
    where: str
    files: Callable[[Paths], Sequence[str]]
    calls: tuple[str, ...] = _CALLS

    def __str__(self) -> str:
        calls = "" if self.calls == _CALLS else f" in {' and '.join(self.calls)}"
        return f"{self.error}{calls} on {self.where}"

    def injected(self, live: LiveGuest) -> Attached:
        assert live.process is not None
        return Attached(strace_of(live.process.pid, self.calls, f"error={self.error}", self.files(live.guest.paths)))


FAULTS = (
    *(MarkFault(error=error, where="both marks", files=_both) for error in ("EROFS", "ENOSPC", "EIO")),
    *(MarkFault(error="EROFS", where=name, files=files) for name, files in (("disk", _on_disk), ("/run", _in_ram))),
)
# One call by itself: what was done before it has to be taken back.
HALFWAY = tuple(
    MarkFault(error="EIO", where=where, files=files, calls=(call,))
    for where, files in (("disk", _on_disk), ("/run", _in_ram))
    for call in ("openat", "write", "fsync", "rename")
)


def without_a_mark(fault: MarkFault) -> Row:
    """Identities are rotated, and there is no mark to be removed: nothing is wrong."""

    def play(live: LiveGuest) -> None:
        live.configure("[React]\nIdentity=rotate\n")
        live.reload()
        with fault.injected(live):
            _fork(live, _ROTATE)
            live.row.check(live.problems() == [], "status names a problem where there is none")

    return _play(f"{fault}, no mark", play)


def used_up(fault: MarkFault) -> Row:
    """A clone uses the mark up, and forks again: that is no fork of the template any more."""

    def play(live: LiveGuest) -> None:
        _ask(live, "prepare", "--template")
        with fault.injected(live):
            _fork(live, _ROTATE)
            _named(live, fault)
            _fork(live, _KEEP)
        _all_is_well(live)

    return _play(f"{fault}, used up", play)


def called_off(fault: MarkFault) -> Row:
    """The template goes on as itself, although the mark cannot be removed."""

    def play(live: LiveGuest) -> None:
        _ask(live, "prepare", "--template")
        with fault.injected(live):
            _ask(live, "resume")
            live.row.check(live.ran() == ["before-snapshot", "after-snapshot"], f"the hooks ran as {live.ran()}")
            _named(live, fault)
            _fork(live, _KEEP)
        _all_is_well(live)

    return _play(f"{fault}, called off", play)


def refused(fault: MarkFault) -> Row:
    """The mark cannot be left: prepare fails and says why, and nothing is prepared."""

    def play(live: LiveGuest) -> None:
        with fault.injected(live):
            run = vmforkctl(live.guest, "prepare", "--template")
            live.row.check(run.returncode == 1, f"prepare ended with exit status {run.returncode}")
            mark = fault.files(live.guest.paths)[0]
            live.row.check(f"declared a template: {mark}: " in run.stderr, f"prepare said {run.stderr}")
            live.row.check(_ask(live, "resume") == "nothing was prepared\n", "something was prepared")
            live.row.check(live.ran() == [], f"the hooks ran as {live.ran()}")
            _fork(live, _KEEP)
        _all_is_well(live)

    return _play(f"{fault}, refused", play)


def _play(name: str, play: Callable[[LiveGuest], None]) -> Row:
    with LiveGuest(name, hook=_HOOK) as live:
        try:
            live.start()
            play(live)
            live.row.seen += len(live.events())
            live.stop()
        except (Broken, VmforkError) as error:
            live.row.check(False, str(error))
        live.row.hooks += len(live.ran())
        return live.row


def _ask(live: LiveGuest, *arguments: str) -> str:
    run = vmforkctl(live.guest, *arguments)
    if run.returncode != 0:
        raise Broken(f"vmforkctl {arguments[0]} failed: {run.stderr}; {live.last_words()}")
    return run.stderr


def _fork(live: LiveGuest, policy: IdentityPolicy) -> None:
    generation = 2 + live.row.sent
    live.fork()
    live.until(lambda: live.shows(generation) and live.is_over(), "the reaction ended")
    found = history.load(live.guest.paths).events[-1].identity
    live.row.check(found.policy is policy, f"the fork's identity policy was {found}")


def _named(live: LiveGuest, fault: MarkFault) -> None:
    mark, problems = fault.files(live.guest.paths)[0], live.problems()
    live.row.check(any(one.startswith(f"{mark}: ") for one in problems), f"status names no mark, but {problems}")


def _all_is_well(live: LiveGuest) -> None:
    live.until(lambda: live.problems() == [], "status names no problem any more")
    left = [path for path in _both(live.guest.paths) if os.path.lexists(path)]
    live.row.check(left == [], f"these are left: {left}")
    _fork(live, _KEEP)


def mark_cases() -> list[tuple[Callable[[MarkFault], Row], MarkFault]]:
    """Every play with every fault that it can meet."""
    found = [(play, fault) for play in (without_a_mark, used_up, called_off, refused) for fault in FAULTS]
    return [*found, *((refused, fault) for fault in HALFWAY)]


def mark_rows(*, every: int = 1) -> Iterator[Row]:
    """One row of all faults in all plays; with `every` n only each n-th case."""
    row = Row(name="marks of a template")
    with ThreadPoolExecutor(WORKERS) as pool:
        for result in pool.map(lambda case: case[0](case[1]), mark_cases()[::every]):
            row.add(result)
    yield row
