# SPDX-License-Identifier: Apache-2.0
"""`make breaks`: breaks vmfork on purpose, one thing at a time, and shows that the matrix turns red.

A test that stays green whatever is broken proves nothing. Each break is made in a copy of the last commit; the rows
that depend on what was broken must fail, and one that does not must still pass, or the guest itself is broken.

Words on the command line choose among the breaks by their names.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
import xml.etree.ElementTree as xml
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from support.breaking import apply, checkout, is_chosen


@dataclass(frozen=True, slots=True, kw_only=True)
class Break:
    """What is broken: in `file` the only `sound` text becomes `broken`. `red` and `green` are names of tests."""

    name: str
    file: str
    sound: str
    broken: str
    red: tuple[str, ...]
    green: str


BREAKS = (
    Break(
        name="the kmsg edge hears nothing",
        file="agent/vmfork/edges/kmsg.py",
        sound="words, newest = words + 1, record.microseconds",
        broken="newest = record.microseconds",
        red=(
            "tests/vm/test_matrix_x86.py::test_five_clones_of_one_snapshot_each_see_one_fork_and_differ",
            "tests/vm/test_matrix_arm64.py::test_twenty_changes_in_a_row_are_twenty_forks",
        ),
        green="tests/vm/test_matrix_arm64.py::test_a_vmclock_alone_tells_of_forks_by_its_poll",
    ),
    Break(
        name="truths are not compared",
        file="agent/vmfork/detector.py",
        sound="if memory.truths.get(name, value) != value])",
        broken="if memory.truths.get(name, value) is None])",
        red=(
            "tests/vm/test_matrix_arm64.py::test_a_vmclock_alone_tells_of_forks_by_its_poll",
            "tests/vm/test_matrix_kernels.py::test_without_a_driver_the_timer_notices_and_clones_differ",
            "tests/vm/test_matrix_cold.py::test_another_id_is_a_cold_fork_that_keeps_its_identity",
        ),
        green="tests/vm/test_matrix_arm64.py::test_twenty_changes_in_a_row_are_twenty_forks",
    ),
    Break(
        name="the timer is never set",
        file="agent/vmfork/daemon/watch.py",
        sound="if self.sources.needs_timer(truths) or is_blind:",
        broken="if is_blind:",
        red=("tests/vm/test_matrix_kernels.py::test_without_a_driver_the_timer_notices_and_clones_differ",),
        green="tests/vm/test_matrix_x86.py::test_a_clone_of_a_clone_of_a_clone_counts_three_forks",
    ),
    Break(
        name="the early boot is not early",
        file="units/vmfork-boot.service",
        sound="Before=network-pre.target sysinit.target\n",
        broken="After=systemd-networkd.service ssh.service\n",
        red=("tests/vm/test_matrix_cold.py::test_another_id_is_a_cold_fork_that_keeps_its_identity",),
        green="tests/vm/test_matrix_cold.py::test_the_same_id_is_a_plain_boot",
    ),
)


def results(copy: Path, tests: Sequence[str]) -> dict[str, str]:
    """Each test's name with what became of it: passed, failed, skipped, or missing."""
    report = copy / "report.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junit-xml={report}", *tests]
    environment = {**os.environ, "PYTHONPATH": os.fspath(copy / "agent"), "CI": "true"}
    subprocess.run(command, cwd=copy, env=environment, stdout=subprocess.DEVNULL, check=False)
    found = dict.fromkeys((test.rpartition("::")[2] for test in tests), "missing")
    for case in xml.parse(report).iter("testcase"):
        kinds = {child.tag for child in case}
        failed = kinds & {"failure", "error"}
        found[str(case.get("name"))] = "failed" if failed else "skipped" if "skipped" in kinds else "passed"
    return found


def wrong(one: Break, found: dict[str, str]) -> list[str]:
    """What is not as it should be: a red row that did not fail, a green one that did not pass."""
    expected = {test.rpartition("::")[2]: "failed" for test in one.red}
    expected[one.green.rpartition("::")[2]] = "passed"
    return [f"{test} {found[test]}, expected: {word}" for test, word in expected.items() if found[test] != word]


def main() -> int:
    bad = False
    for one in BREAKS:
        if not is_chosen(one, sys.argv[1:]):
            continue
        started = time.monotonic()
        with checkout() as copy:
            apply(copy, one)
            found = results(copy, (*one.red, one.green))
        print(f"{one.name} ({one.file}), {time.monotonic() - started:.0f} s")
        for test, word in found.items():
            print(f"    {word:8} {test}")
        for sentence in wrong(one, found):
            bad = True
            print(f"    NOT AS EXPECTED: {sentence}")
        sys.stdout.flush()
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
