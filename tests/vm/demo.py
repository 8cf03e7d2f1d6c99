# SPDX-License-Identifier: Apache-2.0
"""`make demo`: forks real virtual machines and prints what vmfork in each clone noticed.

Needs root and the tools of packages.txt, no KVM. Exits with 0 when every clone noticed its fork and every control, a
copy with the same generation ID, noticed none; with 1 and the reason otherwise.
"""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from lab import archive, cache, host
from lab.guests import Guests
from lab.host import LabError
from lab.payload import payload
from lab.workspace import workspace
from scenes.findings import Findings, table
from scenes.programme import SCENES, Scene
from scenes.stage import Stage, forget_reports
from scenes.terminal import Terminal, wrapped

# Memory and disk of the saved guests and of those that run, in bytes.
_ROOM = 4 << 30
# What only the archive can give; images are made from these in seconds.
_BASES = ("root-trixie-amd64", "root-bookworm-amd64", "mini-trixie-arm64", "kernel-bookworm-amd64")
# What a scene raises when a guest or its answers are not what they should be.
_FAILURES = (LabError, AssertionError, OSError, LookupError, ValueError, subprocess.SubprocessError)

_LEGEND = (
    "id: the generation ID that the hypervisor gave (clock: the counter of its vmclock). forks: events that vmfork "
    "published. after: from the kernel's own record of the fork to the published event (<: at most, counted from the "
    "save, where the time of that record is not to be had). gen, token: vmfork's generation and fork token. random, "
    "uuid4, urandom: what a Python process that ran before the guest was saved drew right after the fork. hooks: "
    "results of the reaction. Hexadecimal is cut to 6 digits."
)


class Demo:
    """One run: as many scenes at a time as there are processors to emulate their guests."""

    def __init__(self, terminal: Terminal, directory: Path, guests: Guests) -> None:
        self._terminal = terminal
        self._guests = guests
        self._stages = {scene.name: Stage(scene.name, directory) for scene in SCENES}

    def run(self) -> list[tuple[Scene, Findings, float]]:
        """Play all scenes; what they found, with the seconds that each took."""
        pool = ThreadPoolExecutor(lanes())
        played: list[Future[tuple[Scene, Findings, float]]] = [pool.submit(self._play, one) for one in SCENES]
        try:
            return [one.result() for one in played]
        except BaseException:
            self._terminal.close()
            pool.shutdown(wait=False, cancel_futures=True)
            for stage in self._stages.values():
                stage.close()
            raise

    def _play(self, scene: Scene) -> tuple[Scene, Findings, float]:
        stage = self._stages[scene.name]
        findings = Findings()
        started = time.monotonic()
        try:
            scene.play(stage, scene.spec(self._guests), scene.expected, findings)
        except _FAILURES as error:
            findings.problems.append(f"{scene.name}: not finished: {error or type(error).__name__}")
        # Whoever still runs was in the middle of something.
        stage.close(report=bool(findings.problems))
        findings.problems += [f"{scene.name}: a guest's serial log: {log}" for log in stage.serial_logs]
        self._terminal.block(described(scene, findings))
        return scene, findings, time.monotonic() - started


def lanes() -> int:
    """How many scenes are played at a time."""
    return min(len(os.sched_getaffinity(0)), len(SCENES))


def described(scene: Scene, findings: Findings) -> list[str]:
    """What a scene found, for people."""
    lines = ["", f"== {scene.title}", *table(findings.rows)]
    for note in findings.notes:
        indent = len(note) - len(note.lstrip())
        lines += wrapped(note.strip(), lead="- " if not indent else "", indent=indent)
    for problem in findings.problems:
        lines += wrapped(problem, lead="WRONG: ")
    return [*lines, ""]


def missing() -> str | None:
    """What keeps the demo from running here."""
    problem = host.missing()
    if problem:
        return problem
    free = shutil.disk_usage(cache.directory()).free
    if free < _ROOM:
        return f"{cache.directory()} has {free >> 20} MiB left, and saved guests need {_ROOM >> 20} MiB there"
    return None


def introduction() -> list[str]:
    """What is going to happen, and how long that takes."""
    count = lanes()
    lines = wrapped(
        f"vmfork demo: {len(SCENES)} kinds of guest are booted in QEMU, saved while they run, and restored several "
        f"times. {count} {'guest runs' if count == 1 else 'guests run'} at a time, emulated and so 10 to 50 times "
        "slower than real ones: the times below are too. This takes about 4 minutes on 2 processors."
    )
    if any(not any(cache.directory().glob(f"{base}-*/")) for base in _BASES):
        lines += wrapped(
            "This is the first run: it downloads some 500 MB of Debian packages and builds the guests from them, "
            f"about 4 minutes more. They are kept in {cache.directory()}, packages come from {archive.mirror()} "
            "(VMFORK_LAB_MIRROR=URL chooses another)."
        )
    return [*lines, "", *wrapped(_LEGEND), ""]


def summary(results: list[tuple[Scene, Findings, float]], seconds: float) -> list[str]:
    """One line for each scene, and the last word."""
    wide = max(len(scene.name) for scene, _, _ in results)
    lines = [f"{scene.name:{wide}}  {took:4.0f} s  {findings.verdict}" for scene, findings, took in results]
    wrong = sum(bool(findings.problems) for _, findings, _ in results)
    last = f"{wrong} of {len(results)} kinds of guest: not as it should be" if wrong else "all as it should be"
    return [*lines, f"vmfork demo: {last}, {seconds // 60:.0f} min {seconds % 60:.0f} s in all"]


def play_all(terminal: Terminal) -> int:
    """Everything, once the host is known to do."""
    terminal.block(introduction())
    forget_reports()
    guests = Guests(payload())
    with workspace() as directory:
        results = Demo(terminal, directory, guests).run()
    terminal.block(summary(results, terminal.elapsed))
    return 1 if any(findings.problems for _, findings, _ in results) else 0


def main() -> int:
    """Play the demo; the exit code."""
    problem = missing()
    if problem:
        print(f"vmfork demo: cannot run here: {problem}", file=sys.stderr)
        return 1
    terminal = Terminal()
    for name in ("lab", "scenes"):
        logger = logging.getLogger(name)
        logger.setLevel(logging.INFO)
        logger.addHandler(terminal)
    try:
        return play_all(terminal)
    except LabError as error:
        print(f"vmfork demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("vmfork demo: interrupted", file=sys.stderr)
        sys.stdout.flush()
        # The threads of the scenes may be in the middle of a build; QEMU ends with them.
        os._exit(130)


if __name__ == "__main__":
    sys.exit(main())
