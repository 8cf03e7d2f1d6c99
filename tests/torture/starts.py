# SPDX-License-Identifier: Apache-2.0
"""What the kernel refuses while the detector starts: it is started behind strace, with a fork from before unhandled.

Files that cannot be read, a /run that is full, a /var that is read-only. A start that fails is tried again, as the
service manager would, and then all must be as if nothing had been: the fork is handled, the generation went up, and no
file was taken for broken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path

from torture import plays
from torture.injection import Injection, strace
from torture.scenario import Scenario, listens, problems_of
from torture.table import Row
from torture.verdict import judge
from vmfork.errors import DaemonUnreachable
from vmfork.paths import Paths

# Fewer refusals than the detector has patience for, and as many as there are calls.
_PASSING, _LASTING = "1..2", "1+"
_SHORT = ("EIO", "ENOMEM", "EMFILE")


class Start(Enum):
    """What becomes of the start behind strace."""

    WORKS = auto()
    FAILS = auto()
    # It works, and what it lacks is told; only the next one, without strace, has everything.
    LIMPS = auto()


@dataclass(frozen=True, slots=True, kw_only=True)
class StartFault:
    """`calls` on `paths` (on anything without them) fail with `error`; `told`: what a problem in status must name."""

    name: str
    error: str
    calls: tuple[str, ...]
    paths: Callable[[Paths], Sequence[str]] = lambda _paths: ()
    when: str = _LASTING
    start: Start = Start.WORKS
    told: str = ""
    cold: bool = False

    def words(self, log: Path) -> list[str]:
        """strace, for a guest beside the log."""
        places = self.paths(Paths(str(log.parent / "guest"))) or (None,)
        return strace(
            injections=[
                Injection(call=call, when=self.when, fault=f"error={self.error}", path=place)
                for call in self.calls
                for place in places
            ]
        )


def _read(
    file: str, path: Callable[[Paths], str], *, calls: Sequence[str] = ("openat", "read"), cold: bool = False
) -> Iterator[StartFault]:
    for call in calls:
        for error in _SHORT:
            for when, start in ((_PASSING, Start.WORKS), (_LASTING, Start.FAILS)):
                yield StartFault(
                    name=f"{error} at {call} of {file} no. {when}" + (", cold" if cold else ""),
                    error=error,
                    calls=(call,),
                    paths=lambda paths: (path(paths),),
                    when=when,
                    start=start,
                    cold=cold,
                )


def _limping(
    error: str,
    what: str,
    calls: tuple[str, ...],
    paths: Callable[[Paths], Sequence[str]],
    *,
    told: str,
    when: str = _LASTING,
    cold: bool = True,
) -> StartFault:
    name = f"{error} on {what}" + (", cold" if cold else "")
    return StartFault(
        name=name, error=error, calls=calls, paths=paths, when=when, start=Start.LIMPS, told=told, cold=cold
    )


def start_faults() -> list[StartFault]:
    """Every file that is read at the start, and every place that must take something then."""
    found = [
        *_read("state.json", lambda paths: paths.state),
        *_read("state.json", lambda paths: paths.state, cold=True),
        *_read("detector.json", lambda paths: paths.detector_memory),
        *_read("detector.intent", lambda paths: paths.detector_intent),
        *_read("boot_id", lambda paths: paths.boot_id),
    ]
    for call in ("openat", "read"):
        for error in _SHORT:
            conf = _configuration
            found.append(_limping(error, f"{call} of vmfork.conf", (call,), conf, told="vmfork.conf", cold=False))
    for error in _SHORT:
        for call in ("openat", "pread64"):
            for cold in (False, True):
                name = f"{error} at {call} of fw_cfg" + (", cold" if cold else "")
                guid = _fw_cfg
                found.append(StartFault(name=name, error=error, calls=(call,), paths=guid, when=_PASSING, cold=cold))
        name = f"{error} at openat of kmsg"
        found.append(StartFault(name=name, error=error, calls=("openat",), paths=_kmsg, when="1"))
    writes = ("mkdir", "openat", "rename", "unlink")
    found += [
        _limping(error, "/var", writes, _var, told="/var/lib/vmfork/", cold=cold)
        for error in ("EROFS", "ENOSPC")
        for cold in (False, True)
    ]
    found += [
        # The first openat is the one for reading, which no full file system refuses.
        _limping("ENOSPC", f"detector.intent in {call}", (call,), _intent, told="detector.intent", when=when)
        for call, when in (("openat", "2+"), ("write", _LASTING))
    ]
    found += [
        StartFault(
            name=f"ENOSPC on the page in {call}",
            error="ENOSPC",
            calls=(call,),
            paths=_new_page,
            cold=True,
            start=Start.FAILS,
        )
        for call in ("openat", "fallocate", "rename")
    ]
    found += [
        StartFault(
            name=f"{error} at {call} no. {number}", error=error, calls=(call,), when=str(number), start=Start.FAILS
        )
        for call, error in (("bind", "ENOSPC"), ("listen", "ENOMEM"))
        for number in (1, 2)
    ]
    return found


def _configuration(paths: Paths) -> Sequence[str]:
    return (f"{paths.config_etc}/vmfork.conf",)


def _fw_cfg(paths: Paths) -> Sequence[str]:
    return (paths.fw_cfg_guid,)


def _kmsg(paths: Paths) -> Sequence[str]:
    return (paths.kmsg,)


def _intent(paths: Paths) -> Sequence[str]:
    return (paths.detector_intent,)


def _var(paths: Paths) -> Sequence[str]:
    return (f"{paths.state}.new", paths.history, paths.state_dir)


def _new_page(paths: Paths) -> Sequence[str]:
    return (f"{paths.run_public}/.generation.new",)


def play_start(fault: StartFault) -> Row:
    """One start behind strace, and what came of it."""

    def play(scenario: Scenario) -> None:
        _configure(scenario)
        (plays.clone_that_is_off if fault.cold else plays.reaction_that_is_cut_off)(scenario)
        scenario.start(victim=True)
        if fault.start is Start.LIMPS:
            settles(scenario)
            must_tell(scenario, fault.told)
            scenario.kill()
            scenario.start()
        settles(scenario)
        scenario.row.check(scenario.deaths == (fault.start is Start.FAILS), f"the daemon ended {scenario.deaths} times")
        all_is_well(scenario)

    return Scenario(fault.name, play, judge, detector=fault.words, may_fail=True).run()


def _configure(scenario: Scenario) -> None:
    text = b"[React]\nTimeoutSec=45\n"
    scenario.guest.put(f"{scenario.guest.paths.config_etc}/vmfork.conf", text)


def settles(scenario: Scenario) -> None:
    """The detector that was started has handled what it found."""
    # The page has its predecessor's word until the detector listens.
    scenario.until(lambda: listens(scenario.guest), "the daemon listens")
    scenario.until(scenario.watches, "who watches came onto the page")
    scenario.until(scenario.settled, "the fork settled")


def must_tell(scenario: Scenario, what: str) -> None:
    """A problem in status names this."""
    problems = _problems(scenario)
    scenario.row.check(any(what in one for one in problems), f"status does not name {what}: {problems}")


def all_is_well(scenario: Scenario) -> None:
    """Nothing is missing any more, and nothing was taken for broken; ends with the detector."""
    scenario.until(lambda: _problems(scenario) == [], "status names no problem any more")
    # Only now it is this detector's own word: it answers when it has looked for its sources.
    scenario.until(scenario.watches, "it watches by event")
    scenario.stop()
    broken = [path.name for path in scenario.guest.root.rglob("*.broken")]
    scenario.row.check(not broken, f"taken for broken: {broken}")


def _problems(scenario: Scenario) -> list[str]:
    try:
        return problems_of(scenario.guest)
    except DaemonUnreachable as error:
        # A start that fails at its second socket had the first one for a moment.
        return [str(error)]
