# SPDX-License-Identifier: Apache-2.0
"""The crash matrix: detector and reactor are killed before every system call that changes something, one at a time.

A first run under strace counts the calls; then there is one scenario for each. Runs differ a little, so a number at
the end may be one call too far: such a case must hold too, but is no kill.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from torture import plays
from torture.injection import CHANGES, KILLED, Injection, counted, strace
from torture.scenario import Scenario, Words
from torture.table import Row
from torture.verdict import judge, judge_called_off, judge_cloned

Play = Callable[[Scenario], None]

# Most of a case is waiting for other processes.
WORKERS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Victim:
    """Who is killed, before which calls, and how a scenario is made that runs it behind these words.

    Fewer than `fewest` of these calls would mean that something else was run.
    """

    name: str
    scenario: Callable[[str, Words], Scenario]
    calls: Sequence[str] = CHANGES
    fewest: int = 20


def _detector(
    name: str, play: Play, verdict: Play = judge, *, calls: Sequence[str] = CHANGES, fewest: int = 20
) -> Victim:
    def scenario(case: str, words: Words) -> Scenario:
        return Scenario(case, play, verdict, detector=words)

    return Victim(name=name, scenario=scenario, calls=calls, fewest=fewest)


def _reactor(name: str, play: Play, verdict: Play = judge, *, run: int = 1) -> Victim:
    return Victim(name=name, scenario=lambda case, words: Scenario(case, play, verdict, reactor=words, reactor_run=run))


# What replacing a file is made of: enough where all the rest is another victim's.
_REPLACING = ("fchmod", "fdatasync", "fsync", "rename")
VICTIMS = (
    _detector("detector", plays.fork_during_a_reaction),
    _detector("restarted detector", plays.fork_while_nobody_watches),
    _detector("pass of the early boot", plays.cold_fork),
    _detector("detector after the early boot", plays.start_after_the_early_boot),
    _detector("detector that cuts the history", plays.fork_with_a_full_history, calls=_REPLACING),
    _detector("word that nobody watches", plays.nobody_watches, fewest=8),
    _reactor("reactor", plays.fork_during_a_reaction),
    _reactor("next reactor", plays.fork_during_a_reaction, run=2),
    _reactor("reactor of the early boot", plays.cold_fork),
    _detector("detector around a snapshot", plays.prepare_and_resume, judge_called_off),
    _detector("detector with a forgotten snapshot", plays.prepare_and_forget, judge_called_off),
    _detector("detector of a template", plays.clone_of_a_template, judge_cloned),
    _reactor("reactor before a snapshot", plays.prepare_and_resume, judge_called_off),
    _reactor("reactor after a snapshot", plays.prepare_and_resume, judge_called_off, run=2),
)


def kill_points(victim: Victim) -> tuple[list[Injection], Row]:
    """One injection for each call that an undisturbed run makes, and what became of that run."""
    scenario = victim.scenario(f"{victim.name}, undisturbed", lambda log: strace(log=log, trace=victim.calls))
    row = scenario.run()
    # A reactor that does not hear that it shall end is killed by the daemon, seconds later.
    row.check(KILLED not in scenario.traced, "a program that nobody touched had to be killed")
    counts = counted(scenario.traced)
    # The first execve is strace's own start of the program.
    counts["execve"] -= 1
    return [
        Injection(call=call, when=str(number), fault="signal=KILL")
        for call, count in sorted(counts.items())
        for number in range(1, count + 1)
    ], row


def crash_matrix(*, every: int = 1, victims: tuple[Victim, ...] = VICTIMS) -> Iterator[Row]:
    """One row for each victim; with `every` n only each n-th kill point is tried."""
    for victim in victims:
        yield _row_of(victim, every)


def _row_of(victim: Victim, every: int) -> Row:
    points, undisturbed = kill_points(victim)
    row = Row(name=f"kill the {victim.name}")
    kills = 0
    with ThreadPoolExecutor(WORKERS) as pool:
        for result, killed in pool.map(lambda point: _one(victim, point), points[::every]):
            row.add(result)
            kills += killed
    row.violations += undisturbed.violations
    row.check(len(points) > victim.fewest, f"only {len(points)} kill points were found")
    row.check(row.cases - kills <= max(1, row.cases // 10), f"only {kills} of {row.cases} cases killed anything")
    row.note = f"{kills} killed, of {len(points)} kill points"
    return row


def _one(victim: Victim, point: Injection) -> tuple[Row, bool]:
    def words(log: Path) -> list[str]:
        return strace(injections=[point], log=log)

    scenario = victim.scenario(f"{victim.name}, {point}", words)
    row = scenario.run()
    return row, KILLED in scenario.traced
