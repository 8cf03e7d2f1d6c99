# SPDX-License-Identifier: Apache-2.0
"""`make torture-breaks`: breaks vmfork on purpose, one thing at a time, and shows that the torture notices.

Each break is made in a copy of the last commit, and the class of faults that is there for it must find the violation
that is expected; with nothing broken the same classes must hold. A table of both goes to artifacts/.

What this cannot show: a file that is never fsynced. Whatever was written is in the kernel's cache, which a SIGKILL
leaves alone; only a power cut would tell.

Words on the command line choose among the breaks by their names.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from support.breaking import TOP, apply, checkout, is_chosen

_HANDLED = "        self._remember(replace(self.remembered, handled=True))\n"
_HISTORY = "        self._write_history()\n"
_BASELINE = "        self.baseline(smbios_uuid=smbios_uuid, instance_id=instance_id, handled_token=event.token)\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class Break:
    """In `file` the only `sound` text becomes `broken`; `red`, tried at each `every`-th point, then says `found`."""

    name: str
    file: str
    sound: str
    broken: str
    red: str
    found: str
    every: int = 1


BREAKS = (
    Break(
        name="no note of the fork before the page",
        file="agent/vmfork/intent.py",
        sound="return len(note) <= _SIZE and os.pwrite(self._descriptor, note, 0) == len(note)",
        broken="return len(note) <= _SIZE",
        red="kill the detector",
        found=r"the history has|other IDs|forks were sent",
        every=3,
    ),
    Break(
        name="handled before the history is written",
        file="agent/vmfork/daemon/ledger.py",
        sound=_HISTORY + _BASELINE + _HANDLED,
        broken=_BASELINE + _HANDLED + _HISTORY,
        red="kill the detector",
        found=r"the history has|forks were sent",
        every=3,
    ),
    Break(
        name="reactors do not lock each other out",
        file="agent/vmfork/reactor/session.py",
        sound="        fcntl.flock(descriptor, fcntl.LOCK_EX)\n",
        broken="",
        red="kill the shipped hooks' actions",
        found=r"test_a_second_reactor_waits",
    ),
    Break(
        name="a killed reactor's hooks run on",
        file="agent/vmfork/reactor/ledger.py",
        sound="unfinished = _unfinished(data, path)",
        broken="unfinished: list[_Entry] = []",
        red="kill the reactor",
        found=r"two reactors ran at once",
        every=5,
    ),
    Break(
        name="lines of processes are believed",
        file="agent/vmfork/edges/kmsg.py",
        sound="self.facility == 0 and self.text == FORK_LINE",
        broken="self.facility in (0, 1) and self.text == FORK_LINE",
        red="flood with overruns",
        found=r"ID unreadable: \d+ forks were sent",
        every=20,
    ),
    Break(
        name="lost records are a word",
        file="agent/vmfork/edges/kmsg.py",
        sound="lost, left = True, left - 1",
        broken="words, left = words + 1, left - 1",
        red="flood with overruns",
        found=r"ID unreadable: \d+ forks were sent",
        every=20,
    ),
    Break(
        name="a late line is another fork",
        file="agent/vmfork/daemon/watch.py",
        sound="words[interrupts.NAME] = 1",
        broken='words.setdefault("kmsg", 1)',
        red="flood with overruns",
        found=r"ID unreadable: \d+ forks were sent",
        every=20,
    ),
    Break(
        name="every fork is kept in memory",
        file="agent/vmfork/daemon/ledger.py",
        sound="        self.page.publish(\n",
        broken='        self.__dict__.setdefault("kept", []).append(event)\n        self.page.publish(\n',
        red="forks in a row",
        found=r"bytes more after",
        every=10,
    ),
)


def tortured(copy: Path, name: str, every: int) -> tuple[list[str], float]:
    """The violations that this class finds in this copy, and how many seconds that took.

    Raises RuntimeError where it did not come to a verdict.
    """
    output, began = copy / "table.txt", time.monotonic()
    output.unlink(missing_ok=True)
    command = [sys.executable, "-m", "torture.run", "--every", str(every), "--output", os.fspath(output), name]
    environment = {**os.environ, "PYTHONPATH": f"{copy}/agent:{copy}/tests"}
    run = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, check=False)
    if run.returncode not in (0, 1) or not output.exists():
        raise RuntimeError(f"{name} came to no verdict: {run.stderr[-500:]}")
    lines = [line for line in output.read_text().splitlines() if line.startswith("VIOLATION ")]
    return [line.removeprefix("VIOLATION ") for line in lines], time.monotonic() - began


def played(chosen: Iterable[Break]) -> Iterable[tuple[bool, str]]:
    """Whether each break was found, and a sentence on it; then whether each class holds with nothing broken."""
    chosen = list(chosen)
    for one in chosen:
        with checkout() as copy:
            apply(copy, one)
            violations, took = tortured(copy, one.red, one.every)
        found = [sentence for sentence in violations if re.search(one.found, sentence)]
        verdict = f"found, {len(found)} times" if found else f"NOT FOUND among {len(violations)} violations"
        told = (found or violations or ["-"])[0][:100]
        yield bool(found), f"{one.name:<40} {one.red:<22} {took:4.0f} s  {verdict}: {told}"
    with checkout() as copy:
        for name, every in sorted({(one.red, one.every) for one in chosen}):
            violations, took = tortured(copy, name, every)
            verdict = f"DOES NOT HOLD: {violations[0]}" if violations else "holds"
            yield not violations, f"{'nothing':<40} {name:<22} {took:4.0f} s  {verdict}"


def main() -> int:
    good, table = True, list[str]()
    for as_expected, line in played(one for one in BREAKS if is_chosen(one, sys.argv[1:])):
        good = good and as_expected
        table.append(line)
        print(line, flush=True)
    artifacts = TOP / "artifacts"
    artifacts.mkdir(exist_ok=True)
    (artifacts / "torture-breaks.txt").write_text("\n".join(table) + "\n")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
