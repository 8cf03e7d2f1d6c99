# SPDX-License-Identifier: Apache-2.0
"""What happens to a guest of the crash matrix, whoever is killed meanwhile.

Every play ends with a detector that was told to stop, so that all files are written.
"""

from __future__ import annotations

from torture.scenario import Scenario
from vmfork.model import Kind


def fork_during_a_reaction(scenario: Scenario) -> None:
    """A fork, and another one while the second hook still runs for the first."""
    _first_fork(scenario, victim=True)
    scenario.go()
    scenario.fork()
    _second_fork(scenario)


def fork_while_nobody_watches(scenario: Scenario) -> None:
    """The first detector is killed in the middle of a reaction, then comes a fork; the victim has to find both."""
    _first_fork(scenario, victim=False)
    scenario.kill()
    scenario.go()
    scenario.fork()
    scenario.start(victim=True)
    _second_fork(scenario)


def cold_fork(scenario: Scenario) -> None:
    """A clone of the disk boots; the victim is the pass of the early boot, and vmforkd starts after it in any case."""
    _power_off_and_clone(scenario)
    scenario.start("--boot", victim=True)
    scenario.finish()
    scenario.start()
    _cold_fork_settles(scenario)


def start_after_the_early_boot(scenario: Scenario) -> None:
    """A clone of the disk boots; the victim is the vmforkd that goes on with what the early boot began."""
    _power_off_and_clone(scenario)
    scenario.start("--boot")
    scenario.finish()
    scenario.start(victim=True)
    _cold_fork_settles(scenario)


def _first_fork(scenario: Scenario, *, victim: bool) -> None:
    scenario.start(victim=victim)
    scenario.until(scenario.watches, "who watches came onto the page")
    scenario.fork()
    scenario.until(lambda: scenario.generation() == 2, "the first fork came onto the page")
    scenario.until(lambda: "start 20-second" in scenario.ran(), "the second hook ran")


def _second_fork(scenario: Scenario) -> None:
    scenario.until(lambda: scenario.generation() == 3, "the second fork came onto the page")
    scenario.until(scenario.settled, "the second fork settled")
    scenario.stop()


def _power_off_and_clone(scenario: Scenario) -> None:
    scenario.go()
    scenario.start()
    scenario.until(scenario.watches, "who watches came onto the page")
    scenario.stop()
    scenario.power_cycle()
    scenario.fork(Kind.COLD)


def _cold_fork_settles(scenario: Scenario) -> None:
    scenario.until(scenario.watches, "who watches came onto the page")
    scenario.until(scenario.settled, "the cold fork settled")
    scenario.stop()
