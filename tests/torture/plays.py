# SPDX-License-Identifier: Apache-2.0
"""What happens to a guest of the crash matrix, whoever is killed meanwhile.

Every play ends with a detector that was told to stop, so that all files are written.
"""

from __future__ import annotations

import subprocess
import sys
import time
from subprocess import DEVNULL

from support.runningdaemon import environment
from torture.past import write_past
from torture.scenario import PATIENCE_SEC, Broken, Scenario
from vmfork.errors import DaemonUnreachable
from vmfork.history import KEPT, SLACK
from vmfork.model import Kind
from vmfork.page import DETECTION_NONE
from vmfork.varlink.client import Client, RemoteError


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


def nobody_watches(scenario: Scenario) -> None:
    """The victim is what the unit runs after a detector that was killed; then comes a fork, and the next detector."""
    _first_fork(scenario, victim=False)
    scenario.kill()
    scenario.go()
    scenario.start("--nobody-watches", victim=True)
    if scenario.finish() == 0:
        page = scenario.page()
        scenario.row.check(page is not None and page.detection == DETECTION_NONE, "the page says somebody watches")
    scenario.fork()
    scenario.start()
    _second_fork(scenario)


def fork_with_a_full_history(scenario: Scenario) -> None:
    """The next line is the one for which the oldest are cut off."""
    write_past(scenario.guest.paths, KEPT + SLACK)
    scenario.go()
    scenario.start(victim=True)
    scenario.until(scenario.watches, "who watches came onto the page")
    scenario.fork()
    scenario.until(lambda: scenario.generation() == 2, "the fork came onto the page")
    scenario.until(scenario.settled, "the fork settled")
    scenario.stop()


def prepare_and_resume(scenario: Scenario) -> None:
    """A template is prepared, and called off; then comes a fork, which is that of no template."""
    _prepare(scenario)
    _ask(scenario, "resume")
    scenario.row.check(scenario.undone(), "the hooks of after-snapshot did not run")
    _go_on_unprepared(scenario)


def prepare_and_forget(scenario: Scenario) -> None:
    """A template is prepared, and nobody comes back: the deadline undoes it."""
    _prepare(scenario, "--deadline", "2")
    scenario.until(scenario.undone, "the hooks of after-snapshot ran by themselves")
    _go_on_unprepared(scenario)


def clone_of_a_template(scenario: Scenario) -> None:
    """A template is prepared and forks, and the clone forks once more."""
    _prepare(scenario)
    scenario.fork()
    scenario.until(scenario.settled, "the fork of the template settled")
    _go_on_unprepared(scenario)


def _prepare(scenario: Scenario, *arguments: str) -> None:
    scenario.go()
    scenario.guest.put(f"{scenario.guest.paths.config_etc}/vmfork.conf", b"[React]\nAckTimeoutSec=200ms\n")
    scenario.start(victim=True)
    scenario.until(scenario.watches, "who watches came onto the page")
    _ask(scenario, "prepare", "--template", *arguments)


def _go_on_unprepared(scenario: Scenario) -> None:
    scenario.until(lambda: not _prepared(scenario), "nothing is prepared any more")
    scenario.fork()
    scenario.until(scenario.settled, "the fork settled")
    scenario.stop()


def _ask(scenario: Scenario, *arguments: str) -> None:
    """Run vmforkctl until it succeeds: the daemon may be killed while it waits for the answer."""
    command = [sys.executable, "-m", "vmfork", "--root", str(scenario.guest.root), *arguments]
    code, end = -1, time.monotonic() + PATIENCE_SEC
    while code != 0:
        if time.monotonic() > end:
            raise Broken(f"vmforkctl {arguments[0]} goes on ending with exit status {code}")
        with subprocess.Popen(command, env=environment(), stdout=DEVNULL, stderr=DEVNULL) as process:
            try:
                scenario.until(lambda: process.poll() is not None, f"vmforkctl {arguments[0]} ended")
            finally:
                process.kill()
            code = process.wait()


def _prepared(scenario: Scenario) -> bool:
    """Whether the daemon still had something to undo; it has not when this returns."""
    try:
        with Client.connect(scenario.guest.paths.admin_socket, timeout=PATIENCE_SEC) as client:
            client.call("io.vmfork.Resume")
    except RemoteError as error:
        return error.name != "io.vmfork.NotPrepared"
    except DaemonUnreachable:
        pass
    return True


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


def reaction_that_is_cut_off(scenario: Scenario) -> None:
    """How other plays begin: a detector is killed in the middle of a reaction, whose fork waits for the next one."""
    _first_fork(scenario, victim=False)
    scenario.kill()
    scenario.go()


def clone_that_is_off(scenario: Scenario) -> None:
    """How other plays begin: a disk was cloned, and its next boot is a cold fork."""
    _power_off_and_clone(scenario)
