# SPDX-License-Identifier: Apache-2.0
"""`make torture`: every class of fault, and a table of what was tried, sent, seen, run and broken.

Below a root prefix, so nothing of this machine is touched; needs strace and gcc, and root for what root alone can try.
Exit status 1 with any violation.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
import xml.etree.ElementTree as xml
from collections.abc import Iterator
from pathlib import Path
from tempfile import NamedTemporaryFile

from torture.alarms import alarm_rows
from torture.clocks import clock_rows
from torture.crash import crash_matrix
from torture.faults import fault_rows
from torture.fuzz import fuzz_row
from torture.markfaults import mark_rows
from torture.storms import storms
from torture.table import Row, render

TOP = Path(__file__).resolve().parents[2]
_BY_TESTS = {
    "kill the shipped hooks' actions": (
        "tests/unit/test_actions_files.py",
        "tests/unit/test_actions_machine_id.py",
        "tests/unit/test_actions_ssh_host_keys.py",
        "tests/integration/test_reactor_session.py",
    ),
    "privileges": ("tests/integration/test_threat_model.py",),
    "uevents, hostile hooks and peers": (
        "tests/integration/test_uevent.py",
        "tests/integration/test_hostile_hooks.py",
        "tests/unit/test_varlink_server.py",
    ),
}


def tests_row(name: str, files: tuple[str, ...]) -> Row:
    """Tests as cases; one that was skipped is none."""
    with NamedTemporaryFile(suffix=".xml") as report:
        command = [sys.executable, "-m", "pytest", "-q", f"--junit-xml={report.name}", *files]
        run = subprocess.run(command, cwd=TOP, capture_output=True, text=True, check=False)
        row = Row(name=name)
        row.check(run.returncode in (0, 1), f"pytest ended with {run.returncode}: {run.stdout[-500:]}")
        skipped = 0
        for case in xml.parse(report.name).iter("testcase") if run.returncode in (0, 1) else ():
            skipped += case.find("skipped") is not None
            row.cases += case.find("skipped") is None
            broken = case.find("failure") is not None or case.find("error") is not None
            row.check(not broken, f"{case.get('name')} failed")
        row.note = f"tests; {skipped} skipped" if skipped else "tests"
    return row


def rows(options: argparse.Namespace) -> Iterator[Row]:
    yield from crash_matrix(every=options.every)
    yield from fault_rows(every=options.every)
    yield from mark_rows(every=options.every)
    yield from storms(forks=10_000 // options.every, lines=1_000_000 // options.every, moments=100 // options.every)
    yield from clock_rows()
    yield from alarm_rows()
    for name, files in _BY_TESTS.items():
        yield tests_row(name, files)
    yield fuzz_row(options.fuzz_seconds)


def main() -> int:
    parser = argparse.ArgumentParser(description="Torture detector and reactor; a table of what came of it.")
    parser.add_argument("--every", type=int, default=1, help="only each n-th case of what is enumerated")
    parser.add_argument("--fuzz-seconds", type=int, default=240, help="for all targets of the fuzzer together")
    parser.add_argument("--output", type=Path, help="write the table into this file, too")
    options = parser.parse_args()
    began, done = time.monotonic(), list[Row]()
    for row in rows(options):
        done.append(row)
        verdict = f"{len(row.violations)} violations" if row.violations else "holds"
        print(
            f"{time.monotonic() - began:6.0f} s  {row.name}: {row.cases} cases, {verdict}", file=sys.stderr, flush=True
        )
    broken = [sentence for row in done for sentence in row.violations]
    table = "\n".join([render(done), *(f"VIOLATION {sentence}" for sentence in broken)])
    print(table)
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(table + "\n")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
