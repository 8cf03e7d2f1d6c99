# SPDX-License-Identifier: Apache-2.0
"""`make torture`: every class of fault, and a table of what was tried, sent, seen, run and broken.

Below a root prefix, so nothing of this machine is touched; needs strace and gcc, and root for what root alone can try.
Exit status 1 with any violation; that the whole took longer than `--within`, and that a class did not end, are some.
"""

from __future__ import annotations

import argparse
import compileall
import subprocess
import sys
import time
import xml.etree.ElementTree as xml
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from tempfile import NamedTemporaryFile

from torture.alarms import alarm_rows
from torture.bounded import FaultClass, bounded
from torture.clocks import clock_rows
from torture.crash import VICTIMS, crash_matrix
from torture.faults import fault_rows
from torture.fuzz import fuzz_row
from torture.markfaults import mark_rows
from torture.storms import storms
from torture.table import Row, render

TOP = Path(__file__).resolve().parents[2]
# All of it, on a machine with two CPUs that has nothing else to do.
WITHIN_SEC = 20 * 60
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


def tests_row(name: str, files: tuple[str, ...]) -> Iterator[Row]:
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
    yield row


def classes(options: argparse.Namespace) -> tuple[FaultClass, ...]:
    """Every class of faults. Its bound is several times what it takes: it is there for what hangs."""
    every = options.every

    def one(name: str, rows: Callable[[], Iterator[Row]], *, bound_sec: float = 600) -> FaultClass:
        return FaultClass(name=name, bound_sec=bound_sec, rows=rows)

    tests = [
        *(one(name, partial(tests_row, name, files)) for name, files in _BY_TESTS.items()),
        one("hostile input", partial(fuzz_row, options.fuzz_seconds), bound_sec=2 * options.fuzz_seconds + 120),
    ]
    return (
        *(one(f"kill the {v.name}", partial(crash_matrix, every=every, victims=(v,))) for v in VICTIMS),
        one("disk and memory", partial(fault_rows, every=every)),
        one("marks of a template", partial(mark_rows, every=every)),
        *(one(name, rows) for name, rows in storms(every=every).items()),
        one("clocks that jump", clock_rows),
        one("false alarms", alarm_rows),
        *(tests if options.tests else ()),
    )


def tried(chosen: Iterator[FaultClass], *, within_sec: float) -> tuple[list[Row], float]:
    """The rows of these classes and how many seconds they took; a line of progress for each."""
    began, done = time.monotonic(), list[Row]()
    for one in chosen:
        for row in bounded(one):
            done.append(row)
            verdict = f"{len(row.violations)} violations" if row.violations else "holds"
            print(
                f"{time.monotonic() - began:6.0f} s  {row.name}: {row.cases} cases, {verdict}",
                file=sys.stderr,
                flush=True,
            )
    took = time.monotonic() - began
    if took > within_sec:
        whole = Row(name="the whole")
        whole.check(False, f"took {took:.0f} s, more than {within_sec:.0f} s")
        done.append(whole)
    return done, took


def main() -> int:
    parser = argparse.ArgumentParser(description="Torture detector and reactor; a table of what came of it.")
    parser.add_argument("--every", type=int, default=1, help="only each n-th case of what is enumerated")
    parser.add_argument(
        "--tests", action=argparse.BooleanOptionalAction, default=True, help="also what `make test` tries"
    )
    parser.add_argument("--fuzz-seconds", type=int, default=240, help="for all targets of the fuzzer together")
    parser.add_argument(
        "--within", type=float, default=WITHIN_SEC, help="seconds that the whole may take (%(default)s)"
    )
    parser.add_argument("--output", type=Path, help="write the table into this file, too")
    parser.add_argument("--list", action="store_true", help="name the classes and end")
    parser.add_argument("only", nargs="*", metavar="CLASS", help="only these; without it all")
    options = parser.parse_args()
    # The byte code that a first run writes would be counted among what a detector or a reactor changes.
    compileall.compile_dir(TOP / "agent", quiet=1)
    known = classes(options)
    unknown = set(options.only) - {one.name for one in known}
    if unknown:
        parser.error(f"no class is named {', '.join(sorted(unknown))}; --list names them")
    if options.list:
        print("\n".join(one.name for one in known))
        return 0
    done, took = tried(
        (one for one in known if not options.only or one.name in options.only), within_sec=options.within
    )
    broken = [sentence for row in done for sentence in row.violations]
    bound = f"{took:.0f} s, bound {options.within:.0f} s"
    table = "\n".join([render(done), bound, *(f"VIOLATION {sentence}" for sentence in broken)])
    print(table)
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(table + "\n")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
